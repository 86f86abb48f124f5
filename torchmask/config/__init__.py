"""YAML and overrides, checked and merged into a recipe's own typed Config; components named by `_component_`.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        model: Component                                # the model to train
        dataset: Component = component("tokenizer")     # training rows; built as instantiate(cfg.dataset, tokenizer)
        batch_size: int = 8                             # rows of a micro-batch

Names are resolved on first use: a recipe that only wants `Component` does not pay for OmegaConf.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmask.config.components import Component, component, instantiate, prepare
    from torchmask.config.load import Checked, load_config
    from torchmask.config.schema import load_recipe
    from torchmask.config.trust import Trust, trust_for_this_process
    from torchmask.errors import ConfigError, ConfigProblems

__all__ = [
    "Checked",
    "Component",
    "ConfigError",
    "ConfigProblems",
    "Trust",
    "component",
    "instantiate",
    "load_config",
    "load_recipe",
    "prepare",
    "trust_for_this_process",
]

_HOMES = {
    "Checked": "torchmask.config.load",
    "Component": "torchmask.config.components",
    "ConfigError": "torchmask.errors",
    "ConfigProblems": "torchmask.errors",
    "Trust": "torchmask.config.trust",
    "component": "torchmask.config.components",
    "instantiate": "torchmask.config.components",
    "load_config": "torchmask.config.load",
    "load_recipe": "torchmask.config.schema",
    "prepare": "torchmask.config.components",
    "trust_for_this_process": "torchmask.config.trust",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchmask.config' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

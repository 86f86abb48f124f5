"""What a family of checkpoints is: a reading of config.json, the way back, and a table of weight names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from torchmask.errors import ConfigError
from torchmask.models.weights import init_weights
from torchmask.modules.decoder import Decoder, DecoderSpec

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Family:
    """One `model_type` of the Hub.

    Attributes:
        model_type: as in config.json.
        spec_from_config: config.json to the architecture.
        config_from_spec: the architecture to a config.json that transformers loads.
        weight_names: the Hub's tensor names to ours, `{}` standing for the layer's number.
        derived: endings of tensor names that are computed, not learned, and are skipped.
    """

    model_type: str
    spec_from_config: Callable[[dict[str, Any]], DecoderSpec]
    config_from_spec: Callable[[DecoderSpec], dict[str, Any]]
    weight_names: dict[str, str]
    derived: tuple[str, ...] = ()

    def to_ours(self, name: str) -> str | None:
        """Our name of a Hub tensor; None for a derived one; an unknown name comes back as it is."""
        if name.endswith(self.derived):
            return None
        return _renamed(name, self.weight_names)

    def to_hub(self, name: str) -> str:
        """The Hub's name of one of our parameters."""
        return _renamed(name, self._inverse)

    @cached_property
    def _inverse(self) -> dict[str, str]:
        return {ours: hub for hub, ours in self.weight_names.items()}


def _renamed(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return table.get(name, name)
    pattern = name[: layer.start(1)] + "{}" + name[layer.end(1) :]
    return table[pattern].replace("{}", layer[1]) if pattern in table else name


def build_model(
    family: Family,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    config: dict[str, Any] | None = None,
    seed: int | None = 0,
) -> Decoder:
    """A decoder on `device`; its parameters are random by `seed`, or left unset with `seed=None` or on `meta`.

    `model.hub_config` is the config.json it stands for, which exports write.

    Raises:
        ConfigError: an unknown name of a dtype.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError("C09", f"dtype is {dtype!r}", where="dtype", fix=f"choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        model = Decoder(spec).to(dtype)
    model.hub_config = config if config is not None else family.config_from_spec(spec)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    model.tie_weights()
    if seed is not None:
        init_weights(model, seed=seed, std=model.hub_config.get("initializer_range", 0.02))
    return model


def sized(family: Family, spec: DecoderSpec) -> Callable[..., Decoder]:
    """A builder of one published size: `builder(dtype=torch.float32, device="cpu", seed=0) -> Decoder`."""

    def builder(
        *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu", seed: int | None = 0
    ) -> Decoder:
        return build_model(family, spec, dtype=dtype, device=device, seed=seed)

    return builder

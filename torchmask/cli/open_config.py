"""A configuration's data without its training run: tokenizer, samples, packs, as the recipe would build them.

Every verb that looks at data opens it here, so that overrides, `--trust`, errors and defaults are those of
`torchmask run`. Nothing is built before it is asked for, and torch is not imported.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torchmask.cli.catalog import find_config, recipe_of
from torchmask.cli.run import check
from torchmask.config import instantiate, trust_for_this_process
from torchmask.data import PackedDataset, Samples
from torchmask.data.probe import WatchingTokenizer
from torchmask.errors import ConfigError

SECTIONS = ("tokenizer", "dataset", "packing")
"""The keys that turn a configuration into data."""


@dataclass(frozen=True)
class DataConfig:
    """The parts of a checked configuration that make its data.

    Args:
        name: as typed.
        path: its file.
        recipe: the recipe whose Config it was checked with.
        values: the whole configuration as plain values, defaults and overrides included.
        key: the dataset looked at: `dataset` or `dataset_val`.
        overrides: as typed.
    """

    name: str
    path: Path
    recipe: str
    values: Mapping[str, Any]
    key: str = "dataset"
    overrides: tuple[str, ...] = ()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return instantiate(self.values["tokenizer"])

    @property
    def control(self) -> dict[int, str]:
        """The texts of the tokenizer's control tokens by id."""
        return {id: text for text, id in self.tokenizer.control_tokens.items()}

    @cached_property
    def samples(self) -> Samples:
        """The samples of the data set.

        Raises:
            DataError, ConfigError: as the data set's builder.
        """
        return self.build_samples(self.tokenizer)

    def build_samples(self, tokenizer: Any, **changes: Any) -> Samples:
        """The samples that the data set's component makes with `tokenizer`; `changes` it does not take are left out."""
        component = self.values[self.key]
        taken = _parameters_of(component["_component_"])
        return Samples.from_samples(
            instantiate({**component, **{k: v for k, v in changes.items() if k in taken}}, tokenizer)
        )

    def watch(self, num_rows: int) -> tuple[WatchingTokenizer, Samples]:
        """A tokenizer that has seen the first `num_rows` rows, read again in this process and past any cache.

        Returns:
            the tokenizer, and the samples of these rows.
        """
        watching = WatchingTokenizer(self.tokenizer)
        wanted = self.values[self.key].get("max_rows")
        num_rows = num_rows if wanted is None else min(num_rows, wanted)
        return watching, self.build_samples(watching, max_rows=num_rows, num_workers=0, cache=False)

    @property
    def packing(self) -> dict[str, Any]:
        """The packing options: the section, and keys of the recipe that packs take too (`loss_normalization`)."""
        taken = inspect.signature(PackedDataset).parameters
        beside = {key: self.values[key] for key in ("loss_normalization",) if key in self.values and key in taken}
        return {**beside, **self.values["packing"]}

    def pack(self, samples: Samples | None = None, **changes: Any) -> PackedDataset:
        """The rows: of all samples or of those given, with other packing options where `changes` says so."""
        return PackedDataset(self.samples if samples is None else samples, **{**self.packing, **changes})

    @cached_property
    def packs(self) -> PackedDataset:
        """The rows of the configuration as it is."""
        return self.pack()

    def validation(self) -> "DataConfig":
        """The same for the validation data.

        Raises:
            ConfigError: C05, the configuration has none.
        """
        if self.values.get("dataset_val") is None:
            raise ConfigError("C05", "'dataset_val' is not set", where=self.name, fix="add it, or leave --val out")
        return replace(self, key="dataset_val")


def open_config(config: str, words: Sequence[str] = (), *, trust: Sequence[str] = ()) -> DataConfig:
    """A configuration, checked as `torchmask validate` checks it; its data is built when asked for.

    Args:
        config: built-in name or YAML file.
        words: the recipe's name, if given, and overrides.
        trust: modules whose components are allowed.

    Raises:
        ConfigProblems: everything that is wrong with it.
        ConfigError: C05, its recipe has no data set to look at.
    """
    path = find_config(config)
    named = [word for word in words[:1] if "=" not in word and not word.startswith("~")]
    recipe = named[0] if named else recipe_of(path)
    overrides = tuple(words[len(named) :])
    checked, allowed, _ = check(recipe, config, overrides, trust, check_files=True)
    missing = [key for key in SECTIONS if checked.values.get(key) is None]
    if missing:
        raise ConfigError(
            "C05",
            f"there is no data to look at: recipe {recipe} has no {', '.join(missing)}",
            where=str(path),
            fix="name a configuration of a recipe that trains, such as finetune",
        )
    trust_for_this_process(allowed)
    return DataConfig(config, path, recipe, checked.values, overrides=overrides)


def _parameters_of(dotpath: str) -> frozenset[str]:
    from torchmask.config.trust import current_trust, import_component

    try:
        return frozenset(inspect.signature(import_component(dotpath, current_trust())).parameters)
    except ValueError:  # a builtin without a signature
        return frozenset()

"""What `PackedDataset` accepts: choices, ranges and combinations, checked before anything is planned."""

from collections.abc import Mapping
from typing import Any

from torchmask.data.eos import DEFAULT_EOS, EosPolicy
from torchmask.data.normalization import NORMALIZATIONS
from torchmask.data.plan import STRATEGIES, check_choice
from torchmask.data.selection import NO_TARGETS, OVER_LENGTH, TRUNCATE_SIDES
from torchmask.errors import ConfigError

ATTENTION = ("document", "causal")
POSITIONS = ("reset", "continue")
PREFIX = ("causal", "bidirectional")

_CHOICES = {
    "strategy": ("packing strategy", STRATEGIES),
    "attention": ("packing attention", ATTENTION),
    "positions": ("packing positions", POSITIONS),
    "prefix": ("packing prefix", PREFIX),
    "loss_normalization": ("loss_normalization", NORMALIZATIONS),
    "over_length": ("over_length", OVER_LENGTH),
    "truncate_side": ("truncate_side", TRUNCATE_SIDES),
    "no_targets": ("no_targets", NO_TARGETS),
}


def check_options(options: Mapping[str, Any], policy: EosPolicy = DEFAULT_EOS) -> None:
    """Refuses unknown choices (ConfigError C06), values out of range (C13) and contradictions (C09).

    Options that are not given are not checked, so that a recipe can check its own before it reads any data.
    """
    for key, (name, choices) in _CHOICES.items():
        if key in options:
            check_choice(name, options[key], choices)
    for key in ("max_seq_len", "max_share"):
        value = options[key]
        if value is not None and value < 1:
            raise ConfigError("C13", f"{key} must be at least 1, got {value}")
    if options["share_prefixes"]:
        _check_sharing(options)
    elif options["max_share"] is not None:
        raise ConfigError(
            "C09",
            f"max_share is {options['max_share']} while share_prefixes is false: there is nothing that it could bound",
            fix="set share_prefixes to true, or max_share to null",
        )
    if options["epoch_repack"]:
        _check_repacking(options)
    if options.get("loss_normalization") == "sequence" and policy.boundary_loss == "train":
        raise ConfigError(
            "C09",
            "loss_normalization is sequence while eos.boundary_loss is train: a prediction between two documents is in "
            "no document's mean",
            fix="set loss_normalization to tokens or weights, or eos.boundary_loss to ignore",
        )


def _check_sharing(options: Mapping[str, Any]) -> None:
    wanted = {
        "strategy": (("best_fit", "first_fit"), "it groups documents by how they begin"),
        "attention": (("document",), "the documents of a tree must not see each other"),
        "positions": (("reset",), "positions in a tree count along each document's path"),
        "prefix": (("causal",), "the shared part would have to see each document's own part"),
    }
    for key, (able, why) in wanted.items():
        if options[key] not in able:
            raise ConfigError(
                "C09",
                f"share_prefixes is true while {key} is {options[key]}: {why}",
                fix=f"set {key} to {' or '.join(able)}, or share_prefixes to false",
            )


def _check_repacking(options: Mapping[str, Any]) -> None:
    if options["strategy"] == "in_order":
        raise ConfigError(
            "C09",
            "epoch_repack is true while strategy is in_order: one shuffles what the other keeps in order",
            fix="set epoch_repack to false, or another strategy",
        )
    if options["strategy"] == "split" and options["trim_tail"]:
        raise ConfigError(
            "C09",
            "epoch_repack is true while strategy is split and trim_tail is true: each epoch would have another number "
            "of rows",
            fix="set trim_tail or epoch_repack to false",
        )

"""What config.json says of rotary positions, in the old spelling (`rope_theta`, `rope_scaling`) and the new one.

The new one is `rope_parameters`: flat, or one table for each type of layer.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torchmask.models.config_values import refusal
from torchmask.modules.rope_scaling import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from torchmask.modules.spec import DecoderSpec

_ABOVE_ZERO = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
_NUMBERS = (*_ABOVE_ZERO, "mscale", "mscale_all_dim", "partial_rotary_factor")
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
        base: of the wavelengths.
        fraction: of each head's channels that are rotated.
    """

    base: float
    scaling: RopeScaling | None
    fraction: float

    def dim(self, head_dim: int) -> int | None:
        """`DecoderSpec.rope_dim`: rotated channels, None = all.

        Raises:
            WeightsError: W05, a scaling that there is not for so many channels.
        """
        num_channels = int(head_dim * self.fraction)
        if isinstance(self.scaling, LongRopeScaling):
            factors = {"short_factor": self.scaling.short_factors, "long_factor": self.scaling.long_factors}
            for key in factors:
                if len(factors[key]) != num_channels // 2:
                    why = f"{num_channels // 2} factors are wanted, as {num_channels} channels rotate"
                    raise refusal(factors, key, why)
        if isinstance(self.scaling, LongRopeScaling | YarnRopeScaling) and num_channels % 2:
            raise refusal(scaling_entry(self.scaling) or {}, "rope_type", f"{num_channels} channels rotate, no pairs")
        if isinstance(self.scaling, DynamicRopeScaling) and num_channels == 2:
            raise refusal({"rope_type": "dynamic"}, "rope_type", "it is not defined for 2 channels")
        return None if self.fraction == 1 else num_channels

    def check_whole(self, head_dim: int) -> None:
        """For families that rotate all channels of a head.

        Raises:
            WeightsError: W05, some channels, or a scaling that there is not for so many.
        """
        if self.fraction != 1:
            given = {"partial_rotary_factor": self.fraction}
            raise refusal(given, "partial_rotary_factor", "this family rotates whole heads")
        self.dim(head_dim)


def read_rope(
    config: dict[str, Any],
    *,
    default_base: float = 10_000.0,
    layer_type: str = "full_attention",
    base_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
    default_fraction: float = 1.0,
) -> Rope:
    """The rotary positions of a type of layer.

    Args:
        config: the content of a config.json.
        default_base, default_fraction: where it says nothing.
        base_key, fraction_key: their names in the old spelling.

    Raises:
        WeightsError: W05, an unknown scaling, one that lacks what it needs, or a value that is no number.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise refusal(config, key, "a table is wanted")
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [key for key in LAYER_TYPES if key in table]
    if nested:
        table = table.get(layer_type) or {}
    _check_numbers(table, _NUMBERS)
    _check_numbers(config, (base_key, fraction_key))
    base = table.get("rope_theta") or config.get(base_key) or default_base
    fraction = table.get("partial_rotary_factor", config.get(fraction_key, default_fraction))
    return Rope(float(base), _scaling(table, config), float(1.0 if fraction is None else fraction))


def _check_numbers(table: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        value, above_zero = table.get(key), key in _ABOVE_ZERO
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and (value > 0 or not above_zero)):
            raise refusal(table, key, "a number above 0 is wanted" if above_zero else "a number is wanted")


def _scaling(table: dict[str, Any], config: dict[str, Any]) -> RopeScaling | None:
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in table):  # Phi-3's first names for it
        kind = "longrope"
    for key in _NEEDED.get(kind, ()):
        if table.get(key) is None:
            raise refusal({key: None}, key, f"a rope scaling of type {kind!r} needs it")
    longest = config.get("max_position_embeddings", 2048)
    original = (
        config.get("original_max_position_embeddings") or table.get("original_max_position_embeddings") or longest
    )
    if kind == "default":
        return None
    _check_numbers(config, ("original_max_position_embeddings",))
    if kind == "linear":
        return LinearRopeScaling(factor=table["factor"])
    if kind == "dynamic":
        return DynamicRopeScaling(factor=table["factor"], original_max_seq_len=longest)
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=table["factor"],
            low_freq_factor=table["low_freq_factor"],
            high_freq_factor=table["high_freq_factor"],
            original_max_seq_len=original,
        )
    factor = table.get("factor") or longest / original
    if kind == "longrope":
        sharper = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return LongRopeScaling(
            short_factors=tuple(table["short_factor"]),
            long_factors=tuple(table["long_factor"]),
            original_max_seq_len=original,
            attention_factor=float(table.get("attention_factor") or sharper),
        )
    if kind == "yarn":
        return YarnRopeScaling(
            factor=factor,
            original_max_seq_len=original,
            attention_factor=_yarn_attention(table, factor),
            beta_fast=table.get("beta_fast") or 32.0,
            beta_slow=table.get("beta_slow") or 1.0,
            truncate=table.get("truncate", True),
        )
    known = "default, linear, dynamic, llama3, yarn, longrope"
    raise refusal({"rope_type": kind}, "rope_type", f"known rope scalings: {known}")


def _yarn_attention(table: dict[str, Any], factor: float) -> float:
    def sharper(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])
    if table.get("mscale") and table.get("mscale_all_dim"):
        return sharper(table["mscale"]) / sharper(table["mscale_all_dim"])
    return sharper(1.0)


def with_rope_types(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose scalings have their kind under `rope_type`.

    Its first name, `type`, is passed over by transformers 5.23 where it makes tables of its own (Gemma 3, OLMo 3).

    >>> with_rope_types({"rope_scaling": {"type": "linear", "factor": 2.0}})
    {'rope_scaling': {'factor': 2.0, 'rope_type': 'linear'}}
    """
    written = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        table = config.get(key)
        if isinstance(table, dict):
            nested = {name: _with_rope_type(table[name]) for name in LAYER_TYPES if isinstance(table.get(name), dict)}
            written[key] = {**table, **nested} if nested else _with_rope_type(table)
    return written


def _with_rope_type(table: dict[str, Any]) -> dict[str, Any]:
    kind = table.get("rope_type") or table.get("type")
    rest = {key: value for key, value in table.items() if key != "type"}
    return rest if kind is None else {**rest, "rope_type": "longrope" if kind == "su" else kind}


def rope_entries(spec: DecoderSpec) -> dict[str, Any]:
    """The entries of config.json for a spec's rotary positions (of layers without a window, where they differ)."""
    entries: dict[str, Any] = {"rope_theta": spec.rope_base, "rope_scaling": scaling_entry(spec.rope_scaling)}
    if spec.rope_dim is not None:
        fraction = spec.rope_dim / spec.head_dim
        if int(spec.head_dim * fraction) < spec.rope_dim:  # as of 30 / 44
            fraction = math.nextafter(fraction, 1.0)
        entries["partial_rotary_factor"] = fraction
    if isinstance(spec.rope_scaling, LongRopeScaling):
        entries["original_max_position_embeddings"] = spec.rope_scaling.original_max_seq_len
    return entries


def scaling_entry(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A scaling as config.json has it."""
    if scaling is None:
        return None
    kinds = {
        LinearRopeScaling: "linear",
        DynamicRopeScaling: "dynamic",
        Llama3RopeScaling: "llama3",
        LongRopeScaling: "longrope",
        YarnRopeScaling: "yarn",
    }
    names = {
        "original_max_seq_len": "original_max_position_embeddings",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
    }
    facts = {names.get(key, key): list(v) if isinstance(v, tuple) else v for key, v in asdict(scaling).items()}
    if isinstance(scaling, DynamicRopeScaling):
        del facts["original_max_position_embeddings"]  # it is max_position_embeddings
    return {"rope_type": kinds[type(scaling)], **facts}

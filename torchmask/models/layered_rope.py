"""Rotary positions of families whose windowed layers have their own: Gemma 3 and OLMo 3.

The new spelling of config.json has a table for each type of layer in `rope_parameters`. In the old one `rope_scaling`
and `rope_theta` are of the layers without a window; those with one are never scaled.
"""

from collections.abc import Mapping
from typing import Any

from torchmask.models.config_values import refusal
from torchmask.models.rope_config import LAYER_TYPES, read_rope, scaling_entry
from torchmask.modules.rope_scaling import YarnRopeScaling
from torchmask.modules.spec import DecoderSpec

FULL, SLIDING = LAYER_TYPES


def layered_rope_facts(
    config: Mapping[str, Any], *, head_dim: int, default_bases: tuple[float, float], window_base_key: str | None
) -> dict[str, Any]:
    """The facts of both kinds of layers.

    Args:
        default_bases: of layers without and with a window.
        window_base_key: in the old spelling, the base of layers with a window; None = it cannot be said there.

    Raises:
        WeightsError: W05, one table for all layers, which these families do not have; parts of heads; a scaling that
            there is not for heads of this size.
    """
    tables = dict(config.get("rope_parameters") or {})
    if tables and not any(layer_type in tables for layer_type in LAYER_TYPES):
        raise refusal(config, "rope_parameters", f"this family has a table for each of {', '.join(LAYER_TYPES)}")
    beside = {"truncate": tables["truncate"]} if "truncate" in tables else {}
    full = {**beside, **(tables.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    window_base = config.get(window_base_key) if window_base_key else None
    beside_all = {key: config[key] for key in _OF_BOTH if key in config}
    ropes = [
        read_rope({"rope_parameters": table, "rope_theta": base, **beside_all}, default_base=default)
        for table, base, default in zip(
            (full, {**beside, **(tables.get(SLIDING) or {})}), (config.get("rope_theta"), window_base), default_bases
        )
    ]
    for rope in ropes:
        rope.check_whole(head_dim)
    return {
        "rope_base": ropes[0].base,
        "rope_scaling": ropes[0].scaling,
        "window_rope_base": ropes[1].base,
        "window_rope_scaling": ropes[1].scaling,
    }


_OLD_SPELLING = ("rope_theta", "rope_scaling", "rope_local_base_freq")
_OF_BOTH = ("max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor")


def layered_rope_entries(spec: DecoderSpec) -> dict[str, Any]:
    """The entries of config.json that `layered_rope_facts` reads."""
    window_base = spec.rope_base if spec.window_rope_base is None else spec.window_rope_base
    full = {"rope_theta": spec.rope_base, **(scaling_entry(spec.rope_scaling) or {"rope_type": "default"})}
    window = {"rope_theta": window_base, **(scaling_entry(spec.window_rope_scaling) or {"rope_type": "default"})}
    tables: dict[str, Any] = {FULL: full, SLIDING: window}
    if _is_untruncated(spec):
        tables["truncate"] = False
    return {"rope_parameters": tables}


def with_layered_ropes(config: dict[str, Any], spec: DecoderSpec) -> dict[str, Any]:
    """A config.json of one of these families as transformers reads it: itself, but for YaRN that is not truncated.

    Transformers 5.23 looks for `truncate` beside the tables, so it is written there too, and the tables with it. It
    cannot be told that some layers are truncated and others are not.
    """
    if not _is_untruncated(spec):
        return config
    other = {key: value for key, value in config.items() if key not in _OLD_SPELLING}
    return {**other, **layered_rope_entries(spec)}


def _is_untruncated(spec: DecoderSpec) -> bool:
    scalings = (spec.rope_scaling, spec.window_rope_scaling)
    return {scaling.truncate for scaling in scalings if isinstance(scaling, YarnRopeScaling)} == {False}

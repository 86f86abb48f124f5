"""What the columns of a store have to be, how they grow, and how several stores become one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.data.eos import EosPolicy
from torchmask.errors import ConfigError
from torchmask.messages import MaskFlag

MAX_PLACES = 10
"""How many places (`file:row`) are kept for one cause in a report; the count is always whole."""

MAX_RULES = 256
"""A token's rule is one byte."""

BROUGHT = "data"
"""The rule of tokens whose flags came with them, and of samples that say nothing of their rules among some that do."""

_ALL_FLAGS = int(MaskFlag.LOSS | MaskFlag.ATTENTION)


def checked(
    tokens: npt.ArrayLike, mask: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.float32] | None]:
    """The three columns in their own dtypes, of one length; a weight of 0 sets the LOSS flag."""
    t, m = _integers("tokens", tokens), _integers("mask", mask)
    if len(t) != len(m):
        raise ValueError(f"tokens and mask must have one length, got {len(t)} tokens and {len(m)} flags")
    if len(t) and (t.min() < 0 or t.max() > np.iinfo(np.int32).max):
        bad = int(t.min()) if t.min() < 0 else int(t.max())
        raise ValueError(f"token ids are integers from 0 to 2**31 - 1, found {bad}")
    if len(m) and (m.min() < 0 or m.max() > _ALL_FLAGS):
        bad = int(m.min()) if m.min() < 0 else int(m.max())
        raise ValueError(f"mask holds MaskFlag values (0 to {_ALL_FLAGS}) or bools (True = masked), found {bad}")
    t, m = t.astype(np.int32, copy=False), m.astype(np.uint8, copy=False)
    if weights is None:
        return t, m, None
    w = np.asarray(weights, dtype=np.float32)
    if w.shape != t.shape:
        raise ValueError(f"tokens and weights must have one length, got {len(t)} tokens and weights of shape {w.shape}")
    if not np.isfinite(w).all():
        raise ValueError(f"weights must be finite, found {w[~np.isfinite(w)][0]}")
    zero = w == 0
    if zero.any():
        m = np.where(zero, m | np.uint8(MaskFlag.LOSS), m)
    return t, m, w


def checked_rules(rules: npt.ArrayLike, size: int) -> npt.NDArray[np.uint8]:
    """The rules of `size` tokens, one byte each."""
    r = _integers("rules", rules)
    if len(r) != size:
        raise ValueError(f"tokens and rules must have one length, got {size} tokens and {len(r)} rules")
    if len(r) and (r.min() < 0 or r.max() > MAX_RULES - 1):
        raise ValueError(f"rules are indexes from 0 to {MAX_RULES - 1}, found {r.min() if r.min() < 0 else r.max()}")
    return r.astype(np.uint8, copy=False)


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array


class Column:
    """A one-dimensional array that grows in place (realloc, so that growing does not need the memory twice)."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data = np.empty(1024, dtype)
        self.size = 0

    def _reserve(self, extra: int) -> None:
        needed = self.size + extra
        if needed > len(self._data):
            self._data.resize(max(needed, len(self._data) * 3 // 2), refcheck=False)  # nobody else holds it

    def extend(self, values: npt.NDArray[Any]) -> None:
        """Appends many."""
        self._reserve(len(values))
        self._data[self.size : self.size + len(values)] = values
        self.size += len(values)

    def push(self, value: int) -> None:
        """Appends one."""
        self._reserve(1)
        self._data[self.size] = value
        self.size += 1

    def finish(self) -> npt.NDArray[Any]:
        """The array, at its true size; the column must not be used afterwards."""
        self._data.resize(self.size, refcheck=False)
        return self._data


def add_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of stores that become one: counts are added, the first places kept."""
    skipped: dict[str, dict[str, Any]] = {}
    for report in reports:
        for cause, entry in report.get("skipped", {}).items():
            total = skipped.setdefault(cause, {"count": 0, "places": []})
            total["count"] += entry["count"]
            total["places"] = (total["places"] + entry["places"])[:MAX_PLACES]
    counts = {key: sum(r.get(key, 0) for r in reports) for key in ("rows_read", "samples", "straddlers")}
    spans: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, entry in report.get("spans", {}).items():
            sums = spans.setdefault(name, new_span_counts())
            for key, value in entry.items():
                sums[key] = sums[key] + value if key != "places" else (sums[key] + value)[:MAX_PLACES]
    return {**counts, "skipped": skipped, **({"spans": spans} if spans else {})}


def new_span_counts() -> dict[str, Any]:
    """The report's entry of a span rule that has seen no row."""
    return {"rows_matched": 0, "rows_unmatched": 0, "rows_no_token": 0, "rows_many": 0, "tokens": 0, "places": []}


def numbers_as_names(rules: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    """A palette for rules that have none."""
    return tuple(f"rule {i}" for i in range(int(rules.max(initial=0)) + 1))


def merge_palettes(
    parts: Sequence[tuple[npt.NDArray[np.uint8] | None, Sequence[str], int]],
) -> tuple[npt.NDArray[np.uint8] | None, tuple[str, ...]]:
    """One column of rules and one palette out of several `(rules, names, number of tokens)`."""
    if all(rules is None for rules, _, _ in parts):
        return None, ()
    palette: dict[str, int] = {}
    columns = []
    for rules, names, size in parts:
        used = names if rules is not None else (BROUGHT,)
        lookup = np.array([palette.setdefault(name, len(palette)) for name in used], np.int64)
        if len(palette) > MAX_RULES:
            raise ValueError(f"the parts name more than {MAX_RULES} rules together")
        columns.append(lookup.astype(np.uint8)[np.zeros(size, np.uint8) if rules is None else rules])
    return np.concatenate(columns), tuple(palette)


def one_policy(policies: Sequence[EosPolicy]) -> EosPolicy:
    """The policy that the packer has to follow; what rows were already made with may differ."""
    first = policies[0]
    for other in policies[1:]:
        for key in ("boundary_loss", "boundary_weight", "on_truncate"):
            if getattr(other, key) != getattr(first, key):
                _refuse_two_policies(f"eos.{key}", getattr(first, key), getattr(other, key))
        if (other.append == "virtual") != (first.append == "virtual"):
            _refuse_two_policies("eos.append", first.append, other.append)
    return first


def _refuse_two_policies(key: str, one: Any, other: Any) -> None:
    message = f"data sets that share rows have {key}={one!r} and {key}={other!r}"
    raise ConfigError("C09", message, fix="give them one policy for what happens between documents")

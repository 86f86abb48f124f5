"""The split text of `datasets`, `train[10%:20%]`, for rows that are read from a file."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torchmask.data.rows import Row
from torchmask.errors import ConfigError, DataError

_SPLIT = re.compile(r"(?P<name>\w[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """One `name[start:stop]` of a split; bounds are rows, or shares of all rows when they end in `%`."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def needs_total(self) -> bool:
        """Whether the number of rows must be known before the first one can be handed out."""
        return any(b is not None and (b.endswith("%") or b.startswith("-")) for b in (self.start, self.stop))

    def bounds(self, total: int) -> tuple[int, int | None]:
        """First row and the one after the last; `total` only counts where `needs_total`."""

        def place(bound: str) -> int:
            at = round(int(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound)
            return max(at + total, 0) if bound.startswith("-") else at

        return place(self.start) if self.start else 0, place(self.stop) if self.stop else None


def parse_split(split: str | None) -> list[SplitPart]:
    """The parts of a split text, in the grammar of `datasets`.

    Raises:
        ConfigError: not of the form `name`, `name[a:b]` or such joined by `+`, or of two names (C09).

    >>> parse_split("train[10%:20%]")[0].bounds(1000)
    (100, 200)
    """
    if split is None:
        return []
    found = [_SPLIT.fullmatch(part.strip()) for part in split.split("+")]
    fix = "write train, train[:100], train[10%:20%] or parts of one split joined by +"
    if not all(found):
        raise ConfigError("C09", f"split {split!r} cannot be read", fix=fix)
    parts = [SplitPart(m["name"], m["start"], m["stop"]) for m in found if m]
    if len({part.name for part in parts}) > 1:
        raise ConfigError("C09", f"split {split!r} joins different splits", fix=fix)
    return parts


def sliced(rows: Callable[[], Iterator[Row]], parts: list[SplitPart], files: list[Path]) -> Iterator[Row]:
    """The slices of all rows, one after the other; negative and percent bounds cost one more pass, which counts."""
    where = str(files[0].absolute()) if files else "the rows that were given"
    where += f" and {len(files) - 1} more" if len(files) > 1 else ""
    total = sum(1 for _ in rows()) if any(part.needs_total for part in parts) else 0
    seen = handed_out = 0
    for part in parts or [SplitPart("train")]:
        start, stop = part.bounds(total)
        for seen, row in enumerate(islice(rows(), stop), 1):
            if seen > start:
                handed_out += 1
                yield row
    if handed_out == 0:
        if seen or total:
            raise DataError("D05", "the slice of the split holds no row", where=where, fix="widen the slice")
        if not files or any(path.stat().st_size for path in files):
            raise DataError("D05", "there are zero rows in it", where=where, fix="name a source with rows")
        raise DataError("D05", "the file is empty (0 bytes)", where=where, fix="fetch or write it again")

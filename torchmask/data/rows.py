"""One row of a source, what is wrong with it, and what a bad row does to the run.

A reader cannot raise for a bad row and go on with the next one, so readers hand out every row, the unreadable ones with
their error (`Row.error`). `BadRows` is the one place that decides between stopping and counting.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchmask.errors import ConfigError, DataError, StopRequested

OnBadRow = Literal["error", "skip"]
Filter = Callable[[Mapping[str, Any]], bool] | Mapping[str, Any]

MAX_SHOWN = 10
"""How many bad rows one error message shows; the count is always whole."""

MAX_EXCERPT = 80
"""Rows of user data are never shown at greater length than this."""


class RowError(DataError):
    """A row that cannot be used. `cause` is the name under which the report counts it."""

    def __init__(
        self,
        id: str,
        cause: str,
        message: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        excerpt: str | None = None,
    ) -> None:
        super().__init__(id, message, where=where, fix=fix, excerpt=excerpt)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        source: the file or data set, as messages should show it.
        number: counted from 1: the line in line formats (JSONL, CSV, text), else the place in the list or table.
        values: columns and their values; empty where `error` is set.
        error: why the row could not be read.
    """

    source: str
    number: int
    values: dict[str, Any]
    error: RowError | None = None

    @property
    def where(self) -> str:
        """`file:row`."""
        return f"{self.source}:{self.number}"


def excerpt(text: str, *, around: int = 0, label: str = "") -> str:
    """At most 80 characters of `text` with `around` in view, `label` included; control characters are shown as dots.

    >>> excerpt("abc\\tdef", label="8 | ")
    '8 | abc·def'
    >>> len(excerpt("x" * 200, around=150))
    80
    """
    room = MAX_EXCERPT - len(label)
    start = 0 if around < room * 3 // 4 else around - room // 2
    shown = text[start : start + room]
    if start:
        shown = "…" + shown[1:]
    if start + room < len(text):
        shown = shown[:-1] + "…"
    return label + "".join(c if c.isprintable() else "·" for c in shown)


def show_value(value: Any) -> str:
    """What was found in place of something else: null, a number, a string and the like, never long.

    >>> show_value(None), show_value(3), show_value({"a": 1})
    ('null', 'the number 3', 'an object')
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {str(value)[:20]}"
        case str():
            return f"the text {value[:30]!r}" + ("…" if len(value) > 30 else "")
        case list() | tuple():
            return f"a list of {len(value)}"
        case Mapping():
            return "an object"
    return f"a {type(value).__name__}"


class BadRows:
    """What bad rows do: stop the run after all of them are known, or be skipped up to a share.

    Args:
        on_bad_row: `error` = any bad row stops, after the whole source was looked through, so that all are named at
            once; `skip` = bad rows are left out and counted.
        max_bad_share: with `skip`, more than this share of all rows still stops the run (a broken file must not become
            a small data set in silence). Up to 10 rows are always tolerated, so that short files can be tried out.
        stop_at_first: raise at the first bad row; for streams, which may have no end.

    Raises:
        ConfigError: an option out of its range (C09).
    """

    def __init__(self, on_bad_row: OnBadRow, *, max_bad_share: float = 0.01, stop_at_first: bool = False) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ConfigError("C09", f"on_bad_row is {on_bad_row!r}", fix="choose error or skip")
        if not 0 <= max_bad_share <= 1:
            raise ConfigError("C09", f"max_bad_share is {max_bad_share}", fix="give a share from 0 to 1")
        self.on_bad_row, self.max_bad_share, self.stop_at_first = on_bad_row, max_bad_share, stop_at_first
        self.count = 0
        self.first: list[RowError] = []

    @property
    def will_stop(self) -> bool:
        """Whether `finish` is sure to raise, so that no further work on good rows is worth while."""
        return self.on_bad_row == "error" and self.count > 0

    def add(self, error: RowError) -> None:
        """Counts one bad row.

        Raises:
            RowError: it is the first one, and that is enough.
        """
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(error)
        if self.will_stop and self.stop_at_first:
            raise error

    def finish(self, num_rows: int) -> None:
        """Called after the last of `num_rows` rows.

        Raises:
            RowError: there are more bad rows than allowed: the first one's id, place and cure, the next ones' places.
        """
        tolerated = 0 if self.on_bad_row == "error" else max(MAX_SHOWN, int(self.max_bad_share * num_rows))
        if self.count <= tolerated:
            return
        first, others = self.first[0], self.first[1:]
        details = [first.excerpt] if first.excerpt else []
        if others:
            details += [f"{self.count} of {num_rows} rows are bad; after this one:"]
            details += [f"{e.where}: [{e.id}] {e.message}" for e in others]
        if self.count > len(self.first):
            details += [f"and {self.count - len(self.first)} more"]
        fix = first.fix or "mend the row"
        if self.on_bad_row == "error":
            fix += ", or set on_bad_row=skip (skipped rows are counted; more than 1 % of them, and more than 10, stop)"
        else:
            details += [
                f"on_bad_row=skip tolerates {tolerated} of {num_rows} rows (max_bad_share={self.max_bad_share})"
            ]
            fix += ", or raise max_bad_share"
        excerpt = "\n    ".join(details) or None
        raise RowError(first.id, first.cause, first.message, where=first.where, excerpt=excerpt, fix=fix)


def keep_rows(rows: Iterable[Row], filter_fn: Filter | None, dropped: Callable[[Row], None]) -> Iterator[Row]:
    """The rows that pass a filter; unreadable rows pass too, since they are somebody else's to judge.

    Args:
        rows: any rows.
        filter_fn: a function of the columns that returns True to keep the row, or `{column: value or list of values}`,
            all of which must match; None keeps everything.
        dropped: told of each row that does not pass.

    Raises:
        DataError: the function failed on a row (D04).

    >>> rows = [Row("a.csv", 1, {"lang": "en"}), Row("a.csv", 2, {"lang": "fr"})]
    >>> [r.number for r in keep_rows(rows, {"lang": ["fr", "de"]}, lambda row: None)]
    [2]
    """
    if filter_fn is not None and not callable(filter_fn) and not isinstance(filter_fn, Mapping):
        fix = "give a function of a row, or a mapping {column: value or list of values}"
        raise ConfigError("C03", f"filter_fn is {show_value(filter_fn)}", fix=fix)
    return _keep_rows(rows, filter_fn, dropped)


def _keep_rows(rows: Iterable[Row], filter_fn: Filter | None, dropped: Callable[[Row], None]) -> Iterator[Row]:
    for row in rows:
        if filter_fn is None or row.error is not None:
            yield row
        elif isinstance(filter_fn, Mapping):
            missing = [column for column in filter_fn if column not in row.values]
            if missing:
                message = f"filter_fn names the column {missing[0]!r}; columns found: {', '.join(row.values) or 'none'}"
                error = RowError("D04", "missing_column", message, where=row.where, fix="mend filter_fn")
                yield Row(row.source, row.number, {}, error)
            elif _matches(row.values, filter_fn):
                yield row
            else:
                dropped(row)
        elif _call(filter_fn, row):
            yield row
        else:
            dropped(row)


def _matches(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(
        values[column] in list(want) if isinstance(want, list | tuple) else values[column] == want
        for column, want in wanted.items()
    )


def _call(filter_fn: Callable[[Mapping[str, Any]], bool], row: Row) -> bool:
    try:
        return bool(filter_fn(row.values))
    except StopRequested:
        raise
    except Exception as error:  # the user's own function: any failure gets the row's place
        message = f"filter_fn failed: {type(error).__name__}: {error}"
        fix = f"the row has the columns {', '.join(row.values) or 'none'}"
        raise DataError("D04", message, where=row.where, fix=fix) from error

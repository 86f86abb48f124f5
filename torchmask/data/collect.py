"""The one pass over the rows of a source: filter, parse, check, tokenise, mask, store, and count what was left out.

Rows are taken in chunks, and a chunk is a pure function of its rows, whether it is worked off here or in another
process. So the number of workers changes neither samples nor errors nor their order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from torchmask.data.bulk import Bulk, Documents
from torchmask.data.choices import check_max_rows
from torchmask.data.formats import Conversation, Format
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import Document
from torchmask.data.rows import BadRows, Filter, Row, RowError, keep_rows
from torchmask.data.sample import Samples
from torchmask.data.sample_builder import SamplesBuilder
from torchmask.data.workers import in_threads, in_workers
from torchmask.errors import DataError

Render = Callable[[Conversation], Sequence[Document]]


class NoRowsLeft(DataError):
    """Rows were read and none of them made a document; `report` counts them by cause."""

    def __init__(self, message: str, *, where: str | None, fix: str, report: dict[str, Any]) -> None:
        super().__init__("D05", message, where=where, fix=fix)
        self.report = report


FIRST_CHUNK, LARGEST_CHUNK = 32, 512
"""Rows of a chunk: few at first, so that a mistake shows at once, then as many as fit a processor's cache."""

MAX_CHUNK_CHARS = 4_000_000


def collect(
    rows: Iterable[Row],
    parse: Format,
    render: Render,
    *,
    policy: MaskPolicy,
    bad: BadRows,
    filter_fn: Filter | None = None,
    max_rows: int | None = None,
    num_workers: int = 0,
) -> Samples:
    """The samples of a source.

    Once a bad row is sure to stop the run, the rest is parsed but not tokenised: every bad row is named, and quickly.

    Args:
        rows: what a source hands out.
        parse: a row -> its messages; none of them = nothing to read there, counted as `empty_text`.
        render: messages -> tokens and what is learned of them; usually one document a row.
        policy: the rules that `render` follows.
        bad: what bad rows do.
        filter_fn: which rows are read at all, see `keep_rows`.
        max_rows: stop after so many rows that pass the filter.
        num_workers: processes that parse and tokenise; 0 = this one.

    Raises:
        RowError: bad rows, by `bad`.
        ConfigError: C13, `max_rows` or `num_workers` is below 0.
        NoRowsLeft: no row is left (D05).
        WorkerLost: D19, a worker was killed.
    """
    check_max_rows(max_rows)
    store, num_rows = SamplesBuilder(eos=policy.eos), 0
    kept = keep_rows(rows, filter_fn, lambda row: store.skip("filtered", row.where))
    job = _Job(parse, render, policy, stops_at_error=bad.on_bad_row == "error")
    chunks = ((chunk, not bad.will_stop) for chunk in _chunks(islice(kept, max_rows)))
    if num_workers == 0 and job.bulk is not None and job.bulk.frees_the_lock:
        results = in_threads(job, chunks)
    else:
        results = in_workers(job, chunks, num_workers=num_workers)
    for chunk in results:
        num_rows += chunk.num_rows
        for error, by_tokenizer in chunk.bad:
            if not (by_tokenizer and bad.will_stop):
                bad.add(error)
        store.extend(chunk.samples)
    bad.finish(num_rows)
    samples = store.finish()
    if not len(samples):
        left_out = ", ".join(f"{cause} {entry['count']}" for cause, entry in samples.report["skipped"].items())
        message = f"no row is left of {samples.report['rows_read']} ({left_out or 'max_rows is 0'})"
        fix = "mend filter_fn, max_rows or the rows"
        raise NoRowsLeft(message, where=_first_place(samples), fix=fix, report=samples.report)
    return samples


class _Rows(list[Row]):
    """Rows that travel to a worker as four columns, in half of the time."""

    def __reduce__(self) -> tuple[Any, ...]:
        columns = zip(*[(row.source, row.number, row.values, row.error) for row in self])
        return _rows_of, tuple(map(list, columns))


def _rows_of(*columns: list[Any]) -> _Rows:
    return _Rows(map(Row, *columns))


def _chunks(rows: Iterator[Row]) -> Iterator[_Rows]:
    """Rows in lists, bounded in number and, roughly, in characters."""
    limit, chunk, chars = FIRST_CHUNK, _Rows(), 0
    for row in rows:
        chunk.append(row)
        chars += _size(row.values)
        if len(chunk) >= limit or chars > MAX_CHUNK_CHARS:
            yield chunk
            limit, chunk, chars = min(2 * limit, LARGEST_CHUNK), _Rows(), 0
    if chunk:
        yield chunk


def _size(values: dict[str, Any]) -> int:
    """About how many characters a row holds."""
    size = 0
    for value in values.values():
        if type(value) is str:
            size += len(value)
        elif type(value) is list:
            size += sum(_size(item if type(item) is dict else {"": item}) for item in value)
        elif type(value) is dict:
            size += _size(value)
    return size


class _Bad(NamedTuple):
    """A bad row, and whether it is the tokenizer that found it bad, which is not asked once the run is sure to stop."""

    error: RowError
    by_tokenizer: bool


class _Chunk(NamedTuple):
    """What came of a chunk of rows."""

    samples: Samples
    bad: list[_Bad]
    num_rows: int


@dataclass(frozen=True)
class _Job:
    """What is done to a chunk `(rows, whether to tokenise them)`."""

    parse: Format
    render: Render
    policy: MaskPolicy
    stops_at_error: bool

    @cached_property
    def bulk(self) -> Bulk | None:
        """Many rows at once, where the rules allow it."""
        return Bulk.of(self.render)

    def __call__(self, task: tuple[list[Row], bool]) -> _Chunk:
        rows, is_wanted = task
        parsed: list[Conversation | RowError] = []
        for row in rows:
            try:
                if row.error is not None:
                    raise row.error
                parsed.append(self.parse(row))
            except RowError as error:
                parsed.append(error)
        num_wanted = len(rows) if is_wanted else 0
        if self.stops_at_error:  # what comes after the first bad row is not worth tokenising
            first_bad = next((i for i, one in enumerate(parsed) if isinstance(one, RowError)), len(rows))
            num_wanted = min(num_wanted, first_bad)
        return self._store(rows, parsed, num_wanted)

    def _store(self, rows: list[Row], parsed: list[Conversation | RowError], num_wanted: int) -> _Chunk:
        """The chunk in the order of its rows; of these the first `num_wanted` are tokenised."""
        store, bad = SamplesBuilder(eos=self.policy.eos), list[_Bad]()
        together = self._together(rows, parsed[:num_wanted])
        next_row = 0
        for row, samples in together:
            self._one_by_one(store, bad, rows[next_row:row], parsed[next_row:row], num_wanted - next_row)
            store.extend(samples)
            next_row = row + len(samples)
        self._one_by_one(store, bad, rows[next_row:], parsed[next_row:], num_wanted - next_row)
        return _Chunk(store.finish(), bad, len(rows))

    def _together(self, rows: list[Row], parsed: list[Conversation | RowError]) -> Iterator[tuple[int, Samples]]:
        """Runs of consecutive rows that were tokenised together: number of the first row, one sample for each."""
        if self.bulk is None:
            return
        places, written = [], []
        for i, conversation in enumerate(parsed):
            if not isinstance(conversation, RowError) and conversation.messages:
                pieces = self.bulk.write(conversation)
                if pieces is not None:
                    places.append(i)
                    written.append(pieces)
        found = self.bulk.documents([parsed[i] for i in places], written) if places else None  # type: ignore[misc]
        if found is None or not len(found.places):
            return
        numbers = np.array(places)[found.places]
        for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1):
            first, last = int(numbers[run[0]]), int(numbers[run[-1]])
            yield first, _as_samples(found, int(run[0]), int(run[-1]) + 1, rows[first : last + 1], self.policy)

    def _one_by_one(
        self,
        store: SamplesBuilder,
        bad: list[_Bad],
        rows: list[Row],
        parsed: list[Conversation | RowError],
        num_wanted: int,
    ) -> None:
        for i, (row, conversation) in enumerate(zip(rows, parsed, strict=True)):
            if isinstance(conversation, RowError):
                store.skip(conversation.cause, row.where)
                bad.append(_Bad(conversation, by_tokenizer=False))
            elif not conversation.messages:
                store.skip("empty_text", row.where)
            elif i < num_wanted and not (self.stops_at_error and bad):
                try:
                    documents = _rendered(self.render, conversation, row)
                except RowError as error:
                    store.skip(error.cause, row.where)
                    bad.append(_Bad(error, by_tokenizer=True))
                    continue
                _append(store, row, documents)


def _as_samples(found: Documents, start: int, stop: int, rows: list[Row], policy: MaskPolicy) -> Samples:
    """Documents `start:stop`, which are those of consecutive rows."""
    cut = slice(found.offsets[start], found.offsets[stop])
    sources: dict[str, int] = {}
    straddlers = int(found.num_straddlers[start:stop].sum())
    return Samples(
        tokens=found.tokens[cut],
        mask=found.mask[cut],
        weights=None,
        offsets=found.offsets[start : stop + 1] - found.offsets[start],
        stops=found.stops[start:stop],
        source_rows=np.array([row.number for row in rows], np.int64),
        source_ids=np.array([sources.setdefault(row.source, len(sources)) for row in rows], np.int32),
        sources=tuple(sources),
        report={"skipped": {}, "straddlers": straddlers},
        rules=found.rules[cut],
        rule_names=policy.rule_names,
        eos=policy.eos,
    )


def _append(store: SamplesBuilder, row: Row, documents: Sequence[Document]) -> None:
    for rendered, decision in documents:
        store.append(
            rendered.tokens,
            decision.mask,
            decision.weights,
            source=row.source,
            row=row.number,
            stop=decision.stop,
            num_straddlers=rendered.num_straddlers + decision.straddlers,
            rules=decision.rules,
            rule_names=decision.rule_names,
            unmatched=decision.is_unmatched,
        )
        for found in decision.spans:
            store.count_span(found.name, places=found.places, tokens=found.tokens, where=row.where)


def _rendered(render: Render, conversation: Conversation, row: Row) -> Sequence[Document]:
    """The documents; what the tokenizer finds wrong with a row gets the row's place."""
    try:
        return render(conversation)
    except RowError:
        raise
    except DataError as error:
        cause = {"D02": "invalid_utf8", "D07": "bad_roles", "D14": "unstable_template"}.get(error.id, "not_renderable")
        raise RowError(error.id, cause, error.message, where=row.where, fix=error.fix, excerpt=error.excerpt) from error


def _first_place(samples: Samples) -> str | None:
    places: Iterator[str] = (entry["places"][0] for entry in samples.report["skipped"].values())
    return next(places, None)

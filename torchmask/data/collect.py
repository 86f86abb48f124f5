"""The one pass over the rows of a source: filter, parse, check, tokenise, mask, store, and count what was left out."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from torchmask.data.formats import Conversation, Format
from torchmask.data.masks import MaskPolicy, mask_of, stop_index
from torchmask.data.rows import BadRows, Filter, Row, RowError, keep_rows
from torchmask.data.sample import Samples, SamplesBuilder
from torchmask.errors import DataError
from torchmask.messages import Rendered


def collect(
    rows: Iterable[Row],
    parse: Format,
    render: Callable[[Conversation], Rendered],
    *,
    policy: MaskPolicy,
    bad: BadRows,
    filter_fn: Filter | None = None,
    max_rows: int | None = None,
) -> Samples:
    """The samples of a source.

    Once a bad row is sure to stop the run, the rest is parsed but not tokenised: every bad row is named, and quickly.

    Args:
        rows: what a source hands out.
        parse: a row -> its messages; none of them = nothing to read there, counted as `empty_text`.
        render: messages -> tokens.
        policy: which messages are trained.
        bad: what bad rows do.
        filter_fn: which rows are read at all, see `keep_rows`.
        max_rows: stop after so many rows that pass the filter.

    Raises:
        RowError: bad rows, by `bad`.
        DataError: no row is left (D05).
    """
    store, num_rows = SamplesBuilder(), 0
    kept = keep_rows(rows, filter_fn, lambda row: store.skip("filtered", row.where))
    for row in islice(kept, max_rows):
        num_rows += 1
        try:
            if row.error is not None:
                raise row.error
            conversation = parse(row)
            if not conversation.messages:
                store.skip("empty_text", row.where)
                continue
            if bad.will_stop:
                continue
            rendered = _rendered(render, conversation, row)
        except RowError as error:
            store.skip(error.cause, row.where)
            bad.add(error)
            continue
        store.append(
            rendered.tokens,
            mask_of(rendered, conversation.messages, policy),
            source=row.source,
            row=row.number,
            stop=stop_index(rendered),
            num_straddlers=rendered.num_straddlers,
        )
    bad.finish(num_rows)
    samples = store.finish()
    if not len(samples):
        left_out = ", ".join(f"{cause} {entry['count']}" for cause, entry in samples.report["skipped"].items())
        message = f"no row is left of {samples.report['rows_read']} ({left_out or 'max_rows is 0'})"
        raise DataError("D05", message, where=_first_place(samples), fix="mend filter_fn, max_rows or the rows")
    return samples


def _rendered(render: Callable[[Conversation], Rendered], conversation: Conversation, row: Row) -> Rendered:
    """The rendering; what the tokenizer finds wrong with a row gets the row's place."""
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

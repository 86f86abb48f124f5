"""Data set builders for rows that need no chat format: plain text, prepared segments, and ids with their flags.

They have torchtune's names where it has them, and the same arguments as those in builders.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from torchmask.data.cache import cached
from torchmask.data.collect import collect
from torchmask.data.eos import EosPolicy, Preset
from torchmask.data.formats import ColumnMap, Conversation, columns
from torchmask.data.masks import Decision, decide
from torchmask.data.policy import BASE_RULES, MaskPolicy, Straddle, stop_weight
from torchmask.data.readers import SampleBy
from torchmask.data.rendering import Document, Tokenizer, render_segments
from torchmask.data.row_flags import ReadyRow, ready_format, segments_format, split_responses
from torchmask.data.rows import BadRows, Filter, OnBadRow, Row
from torchmask.data.sample import Samples
from torchmask.data.sources import DataFiles, open_source
from torchmask.data.span_masks import SpanCount
from torchmask.data.spans import SpanRule
from torchmask.errors import ConfigError
from torchmask.messages import Message, Rendered, TokenKind


@cached
def text_completion_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    sample_by: SampleBy = "line",
    column: str = "text",
    add_bos: bool = True,
    add_eos: bool = True,
    response_template: str | None = None,
    instruction_template: str | None = None,
    allow_special: bool | Sequence[str] = False,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of plain text, `BOS text EOS` each, every token but the first trained: continued pre-training.

    With a `response_template` only what follows it is trained, as TRL's completion-only collator does; the template is
    found in the text and not in its ids. Rows without text are left out and counted as `empty_text`.

    Args:
        tokenizer: a tokenizer; without a BOS it adds none.
        source, data_files, split, name, field, streaming, sample_by: see `open_source`.
        column: the column that holds the text.
        add_bos, add_eos: put BOS in front of, EOS behind each document.
        response_template: what an answer follows, such as `### Response:`; rows without it have nothing to learn and
            are counted in the report's `spans`.
        instruction_template: where an answer ends and the next question begins, for texts of several turns.
        allow_special: control tokens that are read as such where the text has them; True = all, False = none.
        spans, straddle, eos, eos_policy: see `instruct_dataset`; the whole text is the assistant's.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if instruction_template and not response_template:
        raise ConfigError("C09", "instruction_template needs a response_template", fix="set response_template too")
    rules = EosPolicy.of(eos, preset=eos_policy)
    if not add_eos and rules.append != "auto":
        fix = "leave one of the two out"
        raise ConfigError("C09", f"add_eos=false contradicts eos.append={rules.append}", fix=fix)
    rules = rules if add_eos else replace(rules, append="never")
    policy = MaskPolicy(spans=_rules(spans), straddle=straddle, eos=rules, base="text")

    def parse(row: Row) -> Conversation:
        (text,) = columns(row, ("text",), {"text": column})
        if not text.strip():
            return Conversation([])
        if response_template is None:
            return Conversation([Message("assistant", text)])
        return Conversation(split_responses(text, response_template, instruction_template))

    rows = open_source(
        source, data_files=data_files, split=split, name=name, field=field, sample_by=sample_by, streaming=streaming
    )
    special = _special(tokenizer, allow_special)
    documents = partial(_text_documents, tokenizer, policy=policy, add_bos=add_bos, special=special)
    return collect(
        rows,
        parse,
        partial(_count_answers, documents) if response_template else documents,
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


@cached
def segments_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    column_map: ColumnMap | None = None,
    allow_special: bool | Sequence[str] = True,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of Axolotl's `segments`: texts one after the other, each with a `label` that says whether it is trained.

    Whoever writes such rows writes the whole prompt, control tokens included; BOS and EOS are added where the texts do
    not have them.

    Args:
        tokenizer: a tokenizer.
        column_map: the same as `{segments: NAME}`.
        allow_special: control tokens that are read as such where the texts have them; True = all, False = none.
        source, data_files, split, name, field, streaming: see `open_source`.
        spans, straddle, eos, eos_policy: see `instruct_dataset`; trained segments are the assistant's.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    policy = MaskPolicy(spans=_rules(spans), straddle=straddle, eos=EosPolicy.of(eos, preset=eos_policy))
    return collect(
        open_source(source, data_files=data_files, split=split, name=name, field=field, streaming=streaming),
        partial(segments_format, column_map=column_map),
        partial(_text_documents, tokenizer, policy=policy, special=_special(tokenizer, allow_special)),
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


@cached
def tokenized_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    column_map: ColumnMap | None = None,
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of rows that are tokens already: `input_ids`, with `labels`, `completion_mask` or `assistant_masks`.

    Rows without flags are trained whole, which is what labels that are a copy of the inputs mean.

    Args:
        tokenizer: the one that the ids are of.
        column_map: expected name -> name in the source; `weights` too.
        eos, eos_policy: see `EosPolicy`; EOS is appended only with `eos.append: always`.
        source, data_files, split, name, field, streaming: see `open_source`.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    policy = MaskPolicy(eos=EosPolicy.of(eos, preset=eos_policy))

    def documents(row: Conversation) -> list[Document]:
        assert isinstance(row, ReadyRow)
        return [ready_document(row, policy, tokenizer)]

    return collect(
        open_source(source, data_files=data_files, split=split, name=name, field=field, streaming=streaming),
        partial(ready_format, column_map=column_map),
        documents,
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


def ready_document(row: ReadyRow, policy: MaskPolicy, tokenizer: Tokenizer) -> Document:
    """A row that brought its ids: its flags as they are, but for the token that ends it.

    That token is known by its place, the last, and is a stop token if its id is one.
    """
    ids = list(row.tokens)
    stop_ids = {tokenizer.eos_id, *getattr(tokenizer, "stop_ids", ())}
    brought = "text" if row.trained is None else "data"
    trained = np.ones(len(ids), np.bool_) if row.trained is None else row.trained.copy()
    weights = None if row.weights is None else np.array(row.weights, np.float32)
    if policy.eos.append == "always" and tokenizer.eos_id is not None and ids[-1] not in stop_ids:
        ids.append(tokenizer.eos_id)
        trained = np.append(trained, trained[-1])
        weights = None if weights is None else np.append(weights, weights[-1])
    stop = len(ids) - 1 if ids[-1] in stop_ids else -1
    kinds = np.full(len(ids), TokenKind.CONTENT, np.uint8)
    rules = np.full(len(ids), BASE_RULES.index(brought), np.uint8)
    if stop >= 0:
        own = float(trained[stop]) * (1.0 if weights is None else float(weights[stop]))
        rule = "all" if policy.eos.train_on_eos == "last" else policy.eos.train_on_eos
        weight = stop_weight(rule, own, policy.eos)
        trained[stop], kinds[stop], rules[stop] = weight != 0, TokenKind.EOS, BASE_RULES.index("eos")
        if weights is None and weight not in (0, 1):
            weights = np.ones(len(ids), np.float32)
        if weights is not None:
            weights[stop] = weight
    trained[:1], rules[:1] = False, BASE_RULES.index("bos")
    if weights is not None:
        weights = np.where(trained, weights, np.float32(0))
    rendered = Rendered(np.array(ids, np.int32), kinds, np.zeros(len(ids), np.int32))
    mask = (~trained).astype(np.uint8)
    return Document(rendered, Decision(mask, weights, rules, policy.rule_names, stop))


def _text_documents(
    tokenizer: Tokenizer,
    conversation: Conversation,
    *,
    policy: MaskPolicy,
    add_bos: bool = True,
    special: Mapping[str, int] | None = None,
) -> list[Document]:
    rendered = render_segments(tokenizer, conversation.messages, policy, add_bos=add_bos, special=special)
    return [Document(rendered, decide(rendered, conversation.messages, policy))]


def _count_answers(documents: Callable[[Conversation], list[Document]], conversation: Conversation) -> list[Document]:
    """The documents, with what the response template found reported as a span rule's finds are."""
    [(rendered, decision)] = documents(conversation)
    answers = sum(message.role == "assistant" for message in conversation.messages)
    count = SpanCount("response_template", answers, int(np.count_nonzero(decision.mask == 0)))
    return [Document(rendered, replace(decision, spans=[*decision.spans, count]))]


def _rules(spans: Sequence[SpanRule | Mapping[str, Any]]) -> tuple[SpanRule, ...]:
    return tuple(map(SpanRule.of, spans))


def _special(tokenizer: Tokenizer, allowed: bool | Sequence[str]) -> dict[str, int]:
    """The control tokens that are read in text, by their text.

    Raises:
        ConfigError: one that the tokenizer does not have (C06).
    """
    known: Mapping[str, int] = getattr(tokenizer, "control_tokens", {})
    if isinstance(allowed, bool):
        return dict(known) if allowed else {}
    for text in allowed:
        if text not in known:
            fix = f"its control tokens are {', '.join(list(known)[:12]) or 'none'}"
            raise ConfigError("C06", f"allow_special names {text!r}, which the tokenizer does not have", fix=fix)
    return {text: known[text] for text in allowed}

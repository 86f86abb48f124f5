"""Data set builders for rows that need no chat format: plain text, prepared segments, and ids with their flags.

They have torchtune's names where it has them, and arguments in common with those in builders.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from torchmask.data.builder_options import RowOptions, TextOptions, takes
from torchmask.data.cache import cached
from torchmask.data.formats import ColumnMap, Conversation, columns
from torchmask.data.masks import Decision, decide
from torchmask.data.policy import BASE_RULES, MaskPolicy, stop_weight
from torchmask.data.readers import SampleBy
from torchmask.data.rendering import Document, Tokenizer, render_segments
from torchmask.data.row_flags import ReadyRow, ready_format, segments_format, split_responses
from torchmask.data.rows import Row
from torchmask.data.sample import Samples
from torchmask.data.span_masks import SpanCount
from torchmask.errors import ConfigError
from torchmask.messages import Message, Rendered, TokenKind


@cached
@takes(TextOptions)
def text_completion_dataset(
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    source: str,
    sample_by: SampleBy = "line",
    column: str = "text",
    add_bos: bool = True,
    add_eos: bool = True,
    response_template: str | None = None,
    instruction_template: str | None = None,
    allow_special: bool | Sequence[str] = False,
) -> Samples:
    """Samples of plain text, `BOS text EOS` each, every token but the first trained: continued pre-training.

    With a `response_template` only what follows it is trained, as TRL's completion-only collator does; the template is
    found in the text and not in its ids. Rows without text are left out and counted as `empty_text`.

    Args:
        tokenizer: a tokenizer; without a BOS it adds none.
        options: further keyword arguments, see `TextOptions` and `RowOptions`; the whole text is the assistant's.
        source, sample_by: see `open_source`.
        column: the column that holds the text.
        add_bos, add_eos: put BOS in front of each document (where the model's own tokenizer does so with plain text:
            Llama's does, GPT-2's does not), EOS behind it.
        response_template: what an answer follows, such as `### Response:`; rows without it have nothing to learn and
            are counted in the report's `spans`.
        instruction_template: where an answer ends and the next question begins, for texts of several turns.
        allow_special: control tokens that are read as such where the text has them; True = all, False = none.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if instruction_template and not response_template:
        raise ConfigError("C09", "instruction_template needs a response_template", fix="set response_template too")
    stops = options.stops
    if not add_eos and stops.append != "auto":
        fix = "leave one of the two out"
        raise ConfigError("C09", f"add_eos=false contradicts eos.append={stops.append}", fix=fix)
    stops = stops if add_eos else replace(stops, append="never")
    policy = MaskPolicy(spans=options.rules, straddle=options.straddle, eos=stops, base="text")
    parse = partial(_text, column=column, response=response_template, instruction=instruction_template)
    documents = partial(
        _text_documents, tokenizer, policy=policy, add_bos=add_bos, special=_special(tokenizer, allow_special),
        yields_blanks=response_template is not None,
    )  # fmt: skip
    render = partial(_count_answers, documents) if response_template else documents
    return options.read(source, parse, render, policy, sample_by=sample_by)


@cached
@takes(TextOptions)
def segments_dataset(
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    source: str,
    column_map: ColumnMap | None = None,
    allow_special: bool | Sequence[str] = True,
) -> Samples:
    """Samples of Axolotl's `segments`: texts one after the other, each with a `label` that says whether it is trained.

    Whoever writes such rows writes the whole prompt, control tokens included; BOS and EOS are added where the texts do
    not have them.

    Args:
        tokenizer: a tokenizer.
        options: further keyword arguments, see `TextOptions` and `RowOptions`; trained segments are the assistant's.
        source: see `open_source`.
        column_map: the same as `{segments: NAME}`.
        allow_special: control tokens that are read as such where the texts have them; True = all, False = none.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    policy = MaskPolicy(spans=options.rules, straddle=options.straddle, eos=options.stops)
    render = partial(_text_documents, tokenizer, policy=policy, special=_special(tokenizer, allow_special))
    return options.read(source, partial(segments_format, column_map=column_map), render, policy)


@cached
@takes(RowOptions)
def tokenized_dataset(
    tokenizer: Tokenizer, options: RowOptions, *, source: str, column_map: ColumnMap | None = None
) -> Samples:
    """Samples of rows that are tokens already: `input_ids`, with `labels`, `completion_mask` or `assistant_masks`.

    Rows without flags are trained whole, which is what labels that are a copy of the inputs mean.

    Args:
        tokenizer: the one that the ids are of.
        options: further keyword arguments, see `RowOptions`; EOS is appended only with `eos.append: always`.
        source: see `open_source`.
        column_map: expected name -> name in the source; `weights` too.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    policy = MaskPolicy(eos=options.stops)
    render = partial(_ready_documents, policy=policy, tokenizer=tokenizer)
    return options.read(source, partial(ready_format, column_map=column_map), render, policy)


def _text(row: Row, *, column: str, response: str | None, instruction: str | None) -> Conversation:
    """The text of a row, cut into prompts and answers where there is a template for that."""
    (text,) = columns(row, ("text",), {"text": column})
    if not text.strip():
        return Conversation([])
    if response is None:
        return Conversation([Message("assistant", text)])
    return Conversation(split_responses(text, response, instruction))


def _ready_documents(row: Conversation, *, policy: MaskPolicy, tokenizer: Tokenizer) -> list[Document]:
    assert isinstance(row, ReadyRow)
    return [ready_document(row, policy, tokenizer)]


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
    yields_blanks: bool = False,
) -> list[Document]:
    rendered = render_segments(
        tokenizer, conversation.messages, policy, add_bos=add_bos, special=special, yields_blanks=yields_blanks
    )
    return [Document(rendered, decide(rendered, conversation.messages, policy))]


def _count_answers(documents: Callable[[Conversation], list[Document]], conversation: Conversation) -> list[Document]:
    """The documents, with what the response template found reported as a span rule's finds are."""
    [(rendered, decision)] = documents(conversation)
    answers = sum(message.role == "assistant" for message in conversation.messages)
    count = SpanCount("response_template", answers, int(np.count_nonzero(decision.mask == 0)), trains=True)
    return [Document(rendered, replace(decision, spans=[*decision.spans, count]))]


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

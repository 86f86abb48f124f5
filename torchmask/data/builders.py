"""Data set builders under torchtune's names: a tokenizer and a source -> `Samples`.

Each reads its source once, in order, and keeps the tokens in memory; packing, shuffling and batching come later. Their
arguments are spelled out and not shared through `**kwargs`, so that a wrong key of a YAML file is found by name.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torchmask.data.cache import cached
from torchmask.data.chat_formats import (
    chat_format,
    is_prompt_of_messages,
    openai_format,
    prompt_completion_format,
    sharegpt_format,
)
from torchmask.data.collect import collect
from torchmask.data.eos import EosPolicy, Preset
from torchmask.data.formats import (
    ColumnMap,
    Conversation,
    Format,
    alpaca_format,
    check_template,
    instruct_format,
    with_system_prompt,
)
from torchmask.data.policy import MaskingStrategy, MaskPolicy, Straddle, UnstableTemplate
from torchmask.data.rendering import Tokenizer, documents_of
from torchmask.data.rows import BadRows, Filter, OnBadRow, Row, RowError
from torchmask.data.sample import Samples
from torchmask.data.sources import DataFiles, open_source
from torchmask.data.spans import SpanRule
from torchmask.data.squad import NO_ANSWER, expand_squad, read_question, squad_conversation
from torchmask.data.text_builders import segments_dataset, text_completion_dataset, tokenized_dataset
from torchmask.errors import ConfigError

__all__ = [
    "alpaca_dataset",
    "chat_dataset",
    "instruct_dataset",
    "segments_dataset",
    "squad_dataset",
    "text_completion_dataset",
    "tokenized_dataset",
]

_CONVERSATION_STYLES: dict[str, Callable[..., Conversation]] = {
    "auto": chat_format,
    "openai": openai_format,
    "sharegpt": sharegpt_format,
}


@cached
def instruct_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    column_map: ColumnMap | None = None,
    new_system_prompt: str | None = None,
    chat: bool | None = None,
    masking_strategy: MaskingStrategy = "train_on_assistant",
    roles_to_train: Sequence[str] | None = None,
    train_on_input: bool = False,
    train_on_header: bool = False,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    unstable_template: UnstableTemplate = "error",
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of rows with a prompt and its answer (`input` and `output`, or `prompt` and `completion`).

    TRL's rows whose `prompt` and `completion` are lists of messages work too, where there is a chat format.

    Args:
        tokenizer: a tokenizer.
        source, data_files, split, name, field, streaming: see `open_source`.
        column_map: expected name -> name in the source, `{input: question, output: reply}`.
        new_system_prompt: a system message in front of each row.
        chat: write rows in the tokenizer's chat format, or raw, `BOS prompt answer EOS`; None = chat where it has one.
        masking_strategy, roles_to_train: which messages are trained, see `MaskPolicy`.
        train_on_input: train the prompt too: `masking_strategy: train_on_all` under torchtune's older name.
        train_on_header, spans, straddle, unstable_template: see `MaskPolicy`; `spans` are `SpanRule`s.
        eos, eos_policy: the rules for stop tokens, see `EosPolicy`: some of its fields, on top of a preset's.
        filter_fn: which rows to keep: a function of the row, or `{column: value or list of values}`.
        on_bad_row, max_bad_share: see `BadRows`.
        max_rows: read only so many rows.
        num_workers: processes that tokenise; 0 = this one. The result is the same.
        cache: keep the samples on disk: True = in the user's cache folder, or a folder; see docs/data_speed.md.

    Raises:
        DataError: the source or its rows cannot be used; each with file and row.
        ConfigError: options that contradict each other (C09).
    """
    in_chat = _in_chat(tokenizer, chat, new_system_prompt)
    policy = _policy(
        masking_strategy, roles_to_train, train_on_input, train_on_header, spans, straddle,
        EosPolicy.of(eos, preset=eos_policy), unstable_template,
    )  # fmt: skip
    return collect(
        open_source(source, data_files=data_files, split=split, name=name, field=field, streaming=streaming),
        _with_system(partial(_instruct, column_map=column_map, in_chat=in_chat), new_system_prompt),
        partial(documents_of, tokenizer, policy=policy, chat=in_chat),
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


@cached
def alpaca_dataset(
    tokenizer: Tokenizer,
    *,
    source: str = "tatsu-lab/alpaca",
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    column_map: ColumnMap | None = None,
    prompt_template: str | None = None,
    new_system_prompt: str | None = None,
    chat: bool | None = None,
    masking_strategy: MaskingStrategy = "train_on_assistant",
    roles_to_train: Sequence[str] | None = None,
    train_on_input: bool = False,
    train_on_header: bool = False,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    unstable_template: UnstableTemplate = "error",
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of Alpaca rows (`instruction`, optional `input`, `output`) in the published prompts.

    With a chat format the prompt is the user's message; raw, it is the text itself and the output follows it.

    Args:
        tokenizer: a tokenizer.
        column_map: expected name -> name in the source.
        prompt_template: in place of both published prompts, with `{instruction}` and, if wanted, `{input}`.
        source, data_files, split, name, field, streaming: see `open_source`.
        new_system_prompt, chat, masking_strategy to unstable_template: see `instruct_dataset`.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if prompt_template is not None:
        check_template(prompt_template, ("instruction",))
    in_chat = _in_chat(tokenizer, chat, new_system_prompt)
    parse = partial(alpaca_format, column_map=column_map, prompt_template=prompt_template)
    policy = _policy(
        masking_strategy, roles_to_train, train_on_input, train_on_header, spans, straddle,
        EosPolicy.of(eos, preset=eos_policy), unstable_template,
    )  # fmt: skip
    return collect(
        open_source(source, data_files=data_files, split=split, name=name, field=field, streaming=streaming),
        _with_system(parse, new_system_prompt),
        partial(documents_of, tokenizer, policy=policy, chat=in_chat),
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


@cached
def chat_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    field: str | None = None,
    streaming: bool = False,
    conversation_style: str = "auto",
    conversation_column: str | None = None,
    column_map: ColumnMap | None = None,
    new_system_prompt: str | None = None,
    masking_strategy: MaskingStrategy = "train_on_assistant",
    roles_to_train: Sequence[str] | None = None,
    train_on_input: bool = False,
    mask_history: bool = False,
    train_on_header: bool = False,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    unstable_template: UnstableTemplate = "error",
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of whole conversations: OpenAI's `messages` or ShareGPT's `conversations`, with tools.

    Args:
        tokenizer: a tokenizer with a chat format.
        conversation_style: `openai`, `sharegpt`, or `auto` = told by each row.
        conversation_column: name of the column that holds the turns (torchtune's option).
        column_map: the same as `{messages: NAME}` or `{conversations: NAME}`; `{tools: NAME}` for the tools.
        source, data_files, split, name, field, streaming: see `open_source`.
        new_system_prompt: replaces the system messages of all rows.
        mask_history: train the last answer only: `masking_strategy: train_on_last` under LLaMA-Factory's name.
        masking_strategy to unstable_template: see `instruct_dataset`.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if conversation_style not in _CONVERSATION_STYLES:
        fix = f"choose one of {', '.join(_CONVERSATION_STYLES)}"
        raise ConfigError("C06", f"conversation_style is {conversation_style!r}", fix=fix)
    if not tokenizer.has_chat_format:
        fix = "set tokenizer.chat_format, or use instruct_dataset for rows of one prompt and one answer"
        raise ConfigError("C09", "chat_dataset needs a tokenizer with a chat format", fix=fix)
    names = dict(column_map or {})
    if conversation_column is not None:
        names |= {"messages": conversation_column, "conversations": conversation_column}
    if mask_history and masking_strategy == "train_on_all":
        fix = "leave one of the two out"
        raise ConfigError("C09", "mask_history=true contradicts masking_strategy=train_on_all", fix=fix)
    masking_strategy = "train_on_last" if mask_history else masking_strategy
    policy = _policy(
        masking_strategy, roles_to_train, train_on_input, train_on_header, spans, straddle,
        EosPolicy.of(eos, preset=eos_policy), unstable_template,
    )  # fmt: skip
    return collect(
        open_source(source, data_files=data_files, split=split, name=name, field=field, streaming=streaming),
        _with_system(partial(_CONVERSATION_STYLES[conversation_style], column_map=names), new_system_prompt),
        partial(documents_of, tokenizer, policy=policy, chat=True),
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


@cached
def squad_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    streaming: bool = False,
    column_map: ColumnMap | None = None,
    prompt_template: str | None = None,
    no_answer: str = NO_ANSWER,
    new_system_prompt: str | None = None,
    chat: bool | None = None,
    masking_strategy: MaskingStrategy = "train_on_assistant",
    roles_to_train: Sequence[str] | None = None,
    train_on_input: bool = False,
    train_on_header: bool = False,
    spans: Sequence[SpanRule | Mapping[str, Any]] = (),
    straddle: Straddle = "overlap",
    eos: EosPolicy | Mapping[str, Any] | None = None,
    eos_policy: Preset | None = None,
    unstable_template: UnstableTemplate = "error",
    filter_fn: Filter | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: float = 0.01,
    max_rows: int | None = None,
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of SQuAD v2 questions: passage and question in, `{"answer": "..."}` out.

    The original nested JSON and flat rows both work. `source_rows` are the questions' places in the source, as in
    `squad_rows`, which has their ids and all gold answers.

    Args:
        tokenizer: a tokenizer.
        prompt_template: the user's message, with `{context}` and `{question}`; None = `SQUAD_PROMPT`.
        no_answer: the answer where the passage does not say.
        source, data_files, split, name, streaming: see `open_source`; a slice counts questions.
        column_map, new_system_prompt, chat: see `instruct_dataset`.
        masking_strategy to unstable_template: see `instruct_dataset`.
        filter_fn to cache: see `instruct_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if prompt_template is not None:
        check_template(prompt_template, ("context", "question"))
    in_chat = _in_chat(tokenizer, chat, new_system_prompt)

    def parse(row: Row) -> Conversation:
        question = read_question(row, column_map)
        return squad_conversation(question, prompt_template=prompt_template, no_answer=no_answer)

    policy = _policy(
        masking_strategy, roles_to_train, train_on_input, train_on_header, spans, straddle,
        EosPolicy.of(eos, preset=eos_policy), unstable_template,
    )  # fmt: skip
    return collect(
        open_source(source, data_files=data_files, split=split, name=name, streaming=streaming, expand=expand_squad),
        _with_system(parse, new_system_prompt),
        partial(documents_of, tokenizer, policy=policy, chat=in_chat),
        policy=policy,
        bad=BadRows(on_bad_row, max_bad_share=max_bad_share, stop_at_first=streaming),
        filter_fn=filter_fn,
        max_rows=max_rows,
        num_workers=num_workers,
    )


def _instruct(row: Row, *, column_map: ColumnMap | None, in_chat: bool) -> Conversation:
    if not is_prompt_of_messages(row, column_map):
        return instruct_format(row, column_map=column_map)
    if not in_chat:
        message = "prompt and completion are lists of messages, and rows are written raw"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="set tokenizer.chat_format")
    return prompt_completion_format(row, column_map=column_map)


def _in_chat(tokenizer: Tokenizer, chat: bool | None, new_system_prompt: str | None) -> bool:
    """Whether rows are written in the chat format."""
    in_chat = tokenizer.has_chat_format if chat is None else chat
    if in_chat and not tokenizer.has_chat_format:
        raise ConfigError("C09", "chat=true, but the tokenizer has no chat format", fix="set tokenizer.chat_format")
    if not in_chat and new_system_prompt is not None:
        message = "new_system_prompt needs a chat format, and rows are written raw"
        raise ConfigError("C09", message, fix="set tokenizer.chat_format, or put the text into the prompt")
    return in_chat


def _policy(
    strategy: MaskingStrategy,
    roles: Sequence[str] | None,
    train_on_input: bool,
    train_on_header: bool,
    spans: Sequence[SpanRule | Mapping[str, Any]],
    straddle: Straddle,
    eos: EosPolicy,
    unstable_template: UnstableTemplate,
) -> MaskPolicy:
    if train_on_input and (strategy == "train_on_last" or roles is not None):
        other = "roles_to_train" if roles is not None else f"masking_strategy={strategy}"
        raise ConfigError("C09", f"train_on_input=true contradicts {other}", fix="leave one of the two out")
    return MaskPolicy(
        "train_on_all" if train_on_input else strategy,
        None if roles is None else tuple(roles),
        train_on_header,
        tuple(map(SpanRule.of, spans)),
        straddle,
        eos,
        unstable_template,
    )


def _with_system(parse: Format, prompt: str | None) -> Format:
    return lambda row: with_system_prompt(parse(row), prompt)

"""Data set builders under torchtune's names: a tokenizer and a source -> `Samples`.

Each reads its source once, in order, and keeps the tokens in memory; packing, shuffling and batching come later. What
they have in common is in builder_options.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torchmask.data.builder_options import ConversationOptions, chat_dataset_needs, takes
from torchmask.data.cache import cached
from torchmask.data.chat_formats import (
    chat_format,
    is_prompt_of_messages,
    openai_format,
    prompt_completion_format,
    sharegpt_format,
    tools_of,
)
from torchmask.data.choices import choose
from torchmask.data.formats import ColumnMap, Conversation, alpaca_format, check_template, instruct_format
from torchmask.data.rendering import Tokenizer
from torchmask.data.rows import Row, RowError
from torchmask.data.sample import Samples
from torchmask.data.squad import NO_ANSWER, expand_squad, squad_format
from torchmask.data.text_builders import segments_dataset, text_completion_dataset, tokenized_dataset

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
@takes(ConversationOptions)
def instruct_dataset(
    tokenizer: Tokenizer,
    options: ConversationOptions,
    *,
    source: str,
    column_map: ColumnMap | None = None,
    chat: bool | None = None,
) -> Samples:
    """Samples of rows with a prompt and its answer (`input` and `output`, or `prompt` and `completion`).

    TRL's rows whose `prompt` and `completion` are lists of messages work too, where there is a chat format.

    Args:
        tokenizer: a tokenizer.
        options: further keyword arguments, see `ConversationOptions`, `TextOptions` and `RowOptions`.
        source: see `open_source`.
        column_map: expected name -> name in the source, `{input: question, output: reply}`.
        chat: write rows in the tokenizer's chat format, or raw, `BOS prompt answer EOS`; None = chat where it has one.

    Raises:
        DataError: the source or its rows cannot be used; each with file and row.
        ConfigError: options that contradict each other (C09).
    """
    in_chat = options.in_chat(tokenizer, chat)
    parse = partial(_instruct, column_map=column_map, in_chat=in_chat)
    return options.read_conversations(tokenizer, source, parse, in_chat=in_chat)


@cached
@takes(ConversationOptions)
def alpaca_dataset(
    tokenizer: Tokenizer,
    options: ConversationOptions,
    *,
    source: str = "tatsu-lab/alpaca",
    column_map: ColumnMap | None = None,
    prompt_template: str | None = None,
    chat: bool | None = None,
    mask_history: bool = False,
) -> Samples:
    """Samples of Alpaca rows (`instruction`, optional `input`, `output`) in the published prompts.

    With a chat format the prompt is the user's message; raw, it is the text itself and the output follows it.
    LLaMA-Factory's optional columns `history`, `system` and `tools` need a chat format.

    Args:
        tokenizer, options, source, chat: see `instruct_dataset`.
        column_map: expected name -> name in the source.
        prompt_template: in place of both published prompts, with `{instruction}` and, if wanted, `{input}`.
        mask_history: see `chat_dataset`.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if prompt_template is not None:
        check_template(prompt_template, ("instruction",))
    in_chat = options.in_chat(tokenizer, chat)
    parse = partial(_alpaca, column_map=column_map, prompt_template=prompt_template, in_chat=in_chat)
    return options.read_conversations(tokenizer, source, parse, in_chat=in_chat, mask_history=mask_history)


@cached
@takes(ConversationOptions)
def chat_dataset(
    tokenizer: Tokenizer,
    options: ConversationOptions,
    *,
    source: str,
    conversation_style: str = "auto",
    conversation_column: str | None = None,
    column_map: ColumnMap | None = None,
    mask_history: bool = False,
) -> Samples:
    """Samples of whole conversations: OpenAI's `messages` or ShareGPT's `conversations`, with tools and reasoning.

    Args:
        tokenizer: a tokenizer with a chat format.
        options, source: see `instruct_dataset`.
        conversation_style: `openai`, `sharegpt`, or `auto` = told by each row.
        conversation_column: name of the column that holds the turns (torchtune's option).
        column_map: the same as `{messages: NAME}` or `{conversations: NAME}`; `{tools: NAME, system: NAME}` for the
            tools and for a system prompt beside the turns.
        mask_history: train the last answer only: `masking_strategy: train_on_last` under LLaMA-Factory's name.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    choose("conversation_style", conversation_style, tuple(_CONVERSATION_STYLES))
    if not tokenizer.has_chat_format:
        raise chat_dataset_needs(tokenizer)
    names = dict(column_map or {})
    if conversation_column is not None:
        names |= {"messages": conversation_column, "conversations": conversation_column}
    parse = partial(_CONVERSATION_STYLES[conversation_style], column_map=names)
    return options.read_conversations(tokenizer, source, parse, in_chat=True, mask_history=mask_history)


@cached
@takes(ConversationOptions)
def squad_dataset(
    tokenizer: Tokenizer,
    options: ConversationOptions,
    *,
    source: str,
    column_map: ColumnMap | None = None,
    prompt_template: str | None = None,
    no_answer: str = NO_ANSWER,
    chat: bool | None = None,
) -> Samples:
    """Samples of SQuAD v2 questions: passage and question in, `{"answer": "..."}` out.

    The original nested JSON and flat rows both work. `source_rows` are the questions' places in the source, as in
    `squad_rows`, which has their ids and all gold answers.

    Args:
        tokenizer, options, column_map, chat: see `instruct_dataset`.
        source: see `open_source`; a slice counts questions.
        prompt_template: the user's message, with `{context}` and `{question}`; None = `SQUAD_PROMPT`.
        no_answer: the answer where the passage does not say.

    Raises:
        DataError, ConfigError: as `instruct_dataset`.
    """
    if prompt_template is not None:
        check_template(prompt_template, ("context", "question"))
    in_chat = options.in_chat(tokenizer, chat)
    parse = partial(squad_format, column_map=column_map, prompt_template=prompt_template, no_answer=no_answer)
    return options.read_conversations(tokenizer, source, parse, in_chat=in_chat, expand=expand_squad)


def _instruct(row: Row, *, column_map: ColumnMap | None, in_chat: bool) -> Conversation:
    if not is_prompt_of_messages(row, column_map):
        return instruct_format(row, column_map=column_map)
    if not in_chat:
        message = "prompt and completion are lists of messages, and rows are written raw"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="set tokenizer.chat_format")
    return prompt_completion_format(row, column_map=column_map)


def _alpaca(row: Row, *, column_map: ColumnMap | None, prompt_template: str | None, in_chat: bool) -> Conversation:
    conversation = alpaca_format(row, column_map=column_map, prompt_template=prompt_template)
    tools = tools_of(row, column_map)
    if not in_chat and (tools or len(conversation.messages) > 2):
        said = "tools" if tools else "system" if conversation.messages[0].role == "system" else "history"
        message = f"the row has {said}, and rows are written raw, as one prompt and its answer"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="set tokenizer.chat_format")
    return replace(conversation, tools=tools)

"""Conversations and plain text -> tokens with their kinds, with or without a chat format.

A base model's tokenizer has no chat format; for it a prompt and its answer are one text, `BOS prompt answer EOS`. It is
tokenised once, as a whole, and the answer is found by character offsets: the prompt tokenised alone may end in other
tokens than it does in front of the answer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from torchmask.data.eos import DEFAULT_EOS, EosPolicy
from torchmask.data.formats import Conversation
from torchmask.data.masks import Decision, append_eos, decide, finish_chat
from torchmask.data.policy import MaskPolicy, Straddle
from torchmask.data.serving import (
    ChatTokenizer,
    Writing,
    expanded,
    is_rewritten,
    refuse_lost_reasoning,
    serving_mismatch,
    writing,
)
from torchmask.data.span_masks import split_at_edges
from torchmask.errors import ConfigError, DataError
from torchmask.messages import Message, Piece, Rendered, TokenKind


class Tokenizer(ChatTokenizer, Protocol):
    """What this package needs of a tokenizer (`torchmask.tokenizers` has them; siblings do not import each other)."""

    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    @property
    def has_chat_format(self) -> bool:
        """Whether `render` works."""

    def encode_with_offsets(self, text: str, **options: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of plain text and the characters each covers: ids, starts, ends, [n] int32 each.

        The option `goes_on` is given only for text that goes on after a cut.
        """


class Document(NamedTuple):
    """A document and what is learned and seen of it."""

    rendered: Rendered
    decision: Decision


def documents_of(tokenizer: Tokenizer, conversation: Conversation, policy: MaskPolicy, *, chat: bool) -> list[Document]:
    """What a conversation is stored as: one document, or one for each trained turn of a template that needs it.

    Args:
        tokenizer: a tokenizer.
        conversation: the messages and tools.
        policy: the rules.
        chat: False = raw, the texts one after the other.

    Raises:
        DataError: the chat format cannot write these messages (D07), or cannot be trained on as it writes them (D14).
    """
    messages = conversation.messages
    if not chat:
        rendered = render_segments(tokenizer, messages, policy)
        return [Document(rendered, decide(rendered, messages, policy))]
    written = [writing(conversation, policy)]
    unstable: DataError | None = None
    try:
        rendered_all = [_render(tokenizer, written[0], conversation, policy)]
        if is_rewritten(tokenizer, rendered_all[0], written[0], conversation):
            unstable = DataError("D14", "the chat template drops text of a trained turn once other turns follow it")
    except DataError as error:
        if error.id != "D14":
            raise
        unstable = error
    if unstable is not None and policy.unstable_template == "error":
        raise explained(unstable, tokenizer, conversation, policy) from unstable
    if unstable is not None:
        written = expanded(conversation, policy)
        rendered_all = [_render(tokenizer, one, conversation, policy) for one in written]
        for rendered, one in zip(rendered_all, written, strict=True):
            refuse_lost_reasoning(rendered.pieces, one.messages)
    return [
        Document(rendered, decide(rendered, messages, policy, only=one.only))
        for rendered, one in zip(rendered_all, written, strict=True)
    ]


def _render(tokenizer: Tokenizer, one: Writing, conversation: Conversation, policy: MaskPolicy) -> Rendered:
    rendered = tokenizer.render(one.messages, conversation.tools, **one.options)
    return finish_chat(rendered, one.messages, tokenizer.eos_id, policy.eos)


def explained(error: DataError, tokenizer: Tokenizer, conversation: Conversation, policy: MaskPolicy) -> DataError:
    """The error for a template that writes history anew, with the first token that differs and what to do."""
    mismatch = serving_mismatch(tokenizer, conversation, policy)
    if mismatch is None:
        return error
    fix = "set unstable_template to expand (one sample for each trained turn)"
    return DataError(
        "D14",
        f"{error.message}; {mismatch.describe(tokenizer)}",
        where=error.where,
        fix=f"{fix}, or {error.fix}" if error.fix else fix,
    )


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, *, chat: bool, eos: EosPolicy = DEFAULT_EOS
) -> Rendered:
    """A conversation in the tokenizer's chat format, or as one raw text, with its EOS.

    Args:
        tokenizer: a tokenizer.
        conversation: the messages and tools.
        chat: False = raw, the texts one after the other: a prompt and its answer.
        eos: whether EOS is written.

    Raises:
        DataError: the chat format cannot write these messages.
    """
    messages = conversation.messages
    if chat:
        return finish_chat(tokenizer.render(messages, conversation.tools), messages, tokenizer.eos_id, eos)
    return render_segments(tokenizer, messages, MaskPolicy(eos=eos))


def render_segments(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    policy: MaskPolicy,
    *,
    add_bos: bool = True,
    special: Mapping[str, int] | None = None,
    yields_blanks: bool = False,
) -> Rendered:
    """`BOS text text ... EOS` of messages written one after the other without a format, tokenised once.

    A token that covers the edge of two of them is a straddler, which is counted, and belongs to the assistant's, where
    one is; with `straddle: inside` to the other. With `straddle: split` there is no such token.

    Args:
        tokenizer: a tokenizer.
        messages: the texts; only the assistant's count as answers.
        policy: says whether EOS is written, where texts are cut and what becomes of straddlers.
        add_bos: whether BOS is written, where the model's own tokenizer puts it in front of plain text.
        special: control tokens that are read as such in the texts, by their text; BOS and EOS that are there already
            are not written again.
        yields_blanks: a straddler that has nothing but blanks of an answer and begins the text behind it belongs to
            that text: Llama-2's ` USER` is a part of the template `USER:` and not what the answer ends with.

    Raises:
        ConfigError: EOS is asked of a tokenizer that has none, so nothing would teach the model to stop (C09).
        DataError: there is a straddler, and `straddle` is `error` (D14); a message has reasoning beside its text (D07).
    """
    if any(message.reasoning_text for message in messages):
        fix = "set tokenizer.chat_format, or write it into the text"
        raise DataError("D07", "a message has reasoning beside its text, and texts are written raw", fix=fix)
    pieces = [Piece(m.text, TokenKind.CONTENT, i, offset=0) for i, m in enumerate(messages) if m.text]
    pieces = _cut_out(pieces, special) if special else pieces
    if policy.straddle == "split":
        pieces = [
            piece._replace(apart=(i > 0 and piece.turn != pieces[i - 1].turn) or piece.apart)
            for i, piece in enumerate(pieces)
        ]
        pieces = split_at_edges(pieces, messages, policy)
    ids, starts, ends = _encode_runs(tokenizer, pieces, special or {})
    turns, num_straddlers = _owners(pieces, starts, ends, messages, straddle=policy.straddle, yields=yields_blanks)
    has_bos = bool(pieces) and pieces[0].is_token and ids[0] == tokenizer.bos_id
    has_eos = bool(pieces) and pieces[-1].is_token and ids[-1] == tokenizer.eos_id
    kinds = np.full(len(ids), TokenKind.CONTENT, np.uint8)
    if has_bos:
        kinds[0], turns[0] = TokenKind.STRUCTURE, -1
    if has_eos:
        kinds[-1] = TokenKind.EOS
    if add_bos and not has_bos and tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids, kinds, turns = np.insert(ids, 0, tokenizer.bos_id), np.insert(kinds, 0, 0), np.insert(turns, 0, -1)
        starts, ends = np.insert(starts, 0, 0), np.insert(ends, 0, 0)
    rendered = Rendered(ids, kinds, turns, num_straddlers, pieces=pieces, starts=starts, ends=ends)
    if policy.eos.append == "never":
        return rendered
    return append_eos(rendered, _eos(tokenizer), turn=len(messages) - 1)


def _cut_out(pieces: Sequence[Piece], special: Mapping[str, int]) -> list[Piece]:
    """The pieces with control tokens in them as pieces of their own."""
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    result: list[Piece] = []
    for piece in pieces:
        at = piece.offset
        for text in pattern.split(piece.text):
            if text:
                result.append(piece._replace(text=text, is_token=text in special, offset=at))
            at += len(text)
    return result


def _owners(
    pieces: Sequence[Piece],
    starts: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int32],
    messages: Sequence[Message],
    *,
    straddle: Straddle,
    yields: bool,
) -> tuple[npt.NDArray[np.int32], int]:
    """[n] the message that each token belongs to, and how many cover two of them."""
    if not pieces:
        return np.zeros(len(starts), np.int32), 0
    edges = np.cumsum([len(piece.text) for piece in pieces])
    first = np.minimum(np.searchsorted(edges, starts, side="right"), len(pieces) - 1)
    last = np.clip(np.searchsorted(edges, ends - 1, side="right"), first, len(pieces) - 1)
    turns = np.array([piece.turn for piece in pieces], np.int32)
    is_answer = np.array([messages[turn].role == "assistant" for turn in turns])
    straddlers = np.flatnonzero(turns[first] != turns[last])
    if straddle == "error" and len(straddlers):
        at = int(straddlers[0])
        raise DataError(
            "D14",
            f"a token (characters {int(starts[at])} to {int(ends[at])}) covers both the text of message "
            f"{int(turns[first[at]])} and that of message {int(turns[last[at]])}",
            fix="set straddle to overlap, inside or split",
        )
    to_first = is_answer[first] & ~is_answer[last]
    if straddle == "inside":
        to_first = ~is_answer[first] & is_answer[last]
    elif yields:
        for at in straddlers[to_first[straddlers]].tolist():
            text, begin = pieces[first[at]].text, int(edges[first[at]])
            to_first[at] = bool(text[len(text) - begin + int(starts[at]) :].strip())
    return turns[np.where(to_first, first, last)], len(straddlers)


def _encode_runs(
    tokenizer: Tokenizer, pieces: Sequence[Piece], special: Mapping[str, int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Ids of consecutive pieces and the characters each covers; control tokens and what is `apart` alone."""
    runs: list[Piece] = []
    for piece in pieces:
        if runs and not piece.apart and not piece.is_token and not runs[-1].is_token:
            runs[-1] = runs[-1]._replace(text=runs[-1].text + piece.text)
        else:
            runs.append(piece)
    if (len(runs) == 1 and not runs[0].is_token) or not runs:
        return tokenizer.encode_with_offsets("".join(run.text for run in runs))
    columns, base = [], 0
    for i, run in enumerate(runs):
        if run.is_token:
            ids, starts, ends = (np.array([v], np.int32) for v in (special[run.text], 0, len(run.text)))
        elif i and not runs[i - 1].is_token:
            ids, starts, ends = tokenizer.encode_with_offsets(run.text, goes_on=True)
        else:
            ids, starts, ends = tokenizer.encode_with_offsets(run.text)
        columns.append((ids, starts + np.int32(base), ends + np.int32(base)))
        base += len(run.text)
    ids, starts, ends = map(np.concatenate, zip(*columns, strict=True))
    return ids, starts, ends


def render_raw(tokenizer: Tokenizer, prompt: str, completion: str) -> Rendered:
    """`BOS prompt completion EOS` in one tokenisation: the prompt is message 0, completion and EOS are message 1.

    Raises:
        ConfigError: as `render_segments`.
    """
    return render_segments(tokenizer, [Message("user", prompt), Message("assistant", completion)], MaskPolicy())


def render_text(tokenizer: Tokenizer, text: str, *, add_bos: bool = True, add_eos: bool = True) -> Rendered:
    """`BOS text EOS`, all of it message 0.

    Raises:
        ConfigError: EOS is asked of a tokenizer that has none (C09).
    """
    policy = MaskPolicy(eos=DEFAULT_EOS if add_eos else EosPolicy(append="never"))
    return render_segments(tokenizer, [Message("assistant", text)], policy, add_bos=add_bos)


def render_prompt(tokenizer: Tokenizer, conversation: Conversation, *, chat: bool | None = None) -> list[int]:
    """Ids that generation is fed for a conversation whose answer is wanted: what precedes the answer in training.

    Args:
        tokenizer: a tokenizer.
        conversation: messages up to the user's last; in the raw form the single prompt.
        chat: None = whether the tokenizer has a chat format.
    """
    if tokenizer.has_chat_format if chat is None else chat:
        return tokenizer.render(conversation.messages, conversation.tools, add_generation_prompt=True).tokens.tolist()
    (prompt,) = conversation.messages
    return render_text(tokenizer, prompt.text, add_eos=False).tokens.tolist()


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ConfigError(
            "C09", "the tokenizer has no EOS token", fix="add_eos=False for text, or a chat_format for rows"
        )
    return tokenizer.eos_id

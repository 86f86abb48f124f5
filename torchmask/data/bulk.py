"""Documents of many conversations at once: what `documents_of` and `decide` say of each, in a few passes over arrays.

For rows that are decided by message alone, which are nearly all, the look-up tables of `decide` are laid end to end and
asked for all tokens of a batch together. Every other row is told apart and goes the way of one row at a time, so this
module holds no rule of its own: its results are those of `documents_of`, and a property test compares them.

Legend: D documents, n tokens of all of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchmask.data.formats import Conversation
from torchmask.data.masks import finish_chat, table_of
from torchmask.data.policy import LOSS, RULE, MaskPolicy, stop_weight, turn_weights
from torchmask.data.rendering import documents_of
from torchmask.data.serving import lost_text, writing
from torchmask.data.spans import speaks_in_part
from torchmask.errors import DataError
from torchmask.messages import Message, Piece, RenderedBatch, TokenKind

Written = list[Piece] | tuple[Any, ...]
"""A conversation as pieces, or as the sketch of a tokenizer that makes them."""


class Documents(NamedTuple):
    """Documents in flat columns, and which conversations they are of.

    Attributes:
        places: [D] int64, which of the conversations each document is.
        tokens: [n] int32; mask, rules: [n] uint8 as in `Decision`.
        offsets: [D + 1] int64.
        stops: [D] int32, as in `Decision`.
        num_straddlers: [D] int64, as in `Rendered`.
    """

    places: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    rules: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int32]
    num_straddlers: npt.NDArray[np.int64]


class Bulk:
    """Renders the conversations of one data set in batches.

    Args:
        tokenizer: with `write` and `assemble`.
        policy: the rules.
    """

    def __init__(self, tokenizer: Any, policy: MaskPolicy) -> None:
        self._tokenizer, self._policy = tokenizer, policy
        self._is_native = getattr(tokenizer, "chat_format", None) is not None
        self._sketches = self._is_native and hasattr(tokenizer, "sketch")

    @property
    def frees_the_lock(self) -> bool:
        """Whether half of the work is a library's that lets other threads run, and no template's, which may not."""
        return self._is_native

    @classmethod
    def of(cls, render: Any) -> "Bulk | None":
        """The bulk form of a data set's `render`, where it has one: chat formats, rules that decide whole messages."""
        if not isinstance(render, partial) or render.func is not documents_of or not render.args:
            return None
        tokenizer, policy = render.args[0], render.keywords.get("policy")
        can = hasattr(tokenizer, "write") and hasattr(tokenizer, "assemble")
        if policy is None or not can or not render.keywords.get("chat") or not _decides_messages(policy):
            return None
        return cls(tokenizer, policy)

    def write(self, conversation: Conversation) -> Written | None:
        """The conversation as the chat format writes it, or its sketch; None where it has to go alone."""
        if any(map(speaks_in_part, conversation.messages)):
            return None
        try:
            if self._sketches and not conversation.tools:
                sketch: Written | None = self._tokenizer.sketch(conversation.messages)
                if sketch is not None:
                    return sketch
            one = writing(conversation, self._policy)
            if self._is_native:  # written alike whichever turns are trained, but Qwen 3 drops thinking
                native: list[Piece] = self._tokenizer.write(conversation.messages, conversation.tools)
                return native if lost_text(native, one.messages) is None else None
            pieces: list[Piece] = self._tokenizer.write(one.messages, conversation.tools, **one.options)
        except DataError:  # said again, with all that is to be said of it, when it goes alone
            return None
        return pieces if lost_text(pieces, one.messages) is None else None

    def documents(self, conversations: Sequence[Conversation], written: Sequence[Written]) -> Documents | None:
        """The documents of conversations, without those that have to go alone; None where a text cannot be encoded."""
        try:
            if not any(isinstance(one, list) for one in written):
                batch = self._tokenizer.assemble_sketches(written)
            else:
                pieces = [
                    one if isinstance(one, list) else self._tokenizer.write(conversation.messages, conversation.tools)
                    for one, conversation in zip(written, conversations, strict=True)
                ]
                batch = self._tokenizer.assemble(pieces, with_characters=False)
        except DataError:
            return None
        messages = [conversation.messages for conversation in conversations]
        return _decided(batch, messages, self._are_whole(batch, messages), self._policy)

    def _are_whole(self, batch: RenderedBatch, messages: Sequence[Sequence[Message]]) -> npt.NDArray[np.bool_]:
        """[C] bool: the conversations to which `finish_chat` would append nothing, and that have tokens at all."""
        eos_id, eos = self._tokenizer.eos_id, self._policy.eos
        counts = np.diff(batch.offsets)
        if eos.append == "always":
            same = [finish_chat(one := batch[i], talk, eos_id, eos) is one for i, talk in enumerate(messages)]
            return np.array(same, np.bool_) & (counts > 0)
        if eos.append == "never" or eos_id is None:
            return counts > 0
        goes_on = np.array(
            [not talk or talk[-1].role != "assistant" or not talk[-1].eot for talk in messages], np.bool_
        )
        is_end = (batch.kinds == TokenKind.END_OF_TURN) | (batch.kinds == TokenKind.EOS)
        is_end &= batch.turns == np.repeat(np.array([len(talk) - 1 for talk in messages], np.int32), counts)
        ends = np.concatenate(([0], np.cumsum(is_end)))[batch.offsets]
        return (counts > 0) & (goes_on | (np.diff(ends) > 0))


def _decides_messages(policy: MaskPolicy) -> bool:
    """Whether all that the rules look at is a token's message and kind, and all that they say is yes or no."""
    plain = not policy.spans and not policy.train_on_header and policy.straddle != "split"
    return plain and policy.eos.for_eot != "last" and policy.eos.weight == 1


def _decided(
    batch: RenderedBatch, messages: Sequence[Sequence[Message]], whole: npt.NDArray[np.bool_], policy: MaskPolicy
) -> Documents:
    """`decide` for all documents that are `whole` ([C] bool) and whose messages have no weights of their own."""
    tables = [table_of(tuple(turn_weights(talk, policy)), policy) for talk in messages]
    numbers: dict[int, int] = {}
    number = np.array([numbers.setdefault(id(table), len(numbers)) for table in tables], np.int64)
    distinct = list({id(table): table for table in tables}.values())
    sizes = np.array([len(table.mask) for table in distinct] or [0])
    starts = np.cumsum(sizes) - sizes

    keep = whole & ~np.array([table.is_weighted for table in distinct] or [False])[number]
    counts = np.where(keep, np.diff(batch.offsets), 0)
    is_kept = np.repeat(keep, np.diff(batch.offsets))
    tokens, kinds, turns = batch.tokens, batch.kinds, batch.turns
    if not keep.all():
        tokens, kinds, turns = tokens[is_kept], kinds[is_kept], turns[is_kept]
    places = np.flatnonzero(keep)
    offsets = np.concatenate(([0], np.cumsum(counts[places])))
    number, counts = number[places], counts[places]

    codes = turns * 4 + kinds  # below 0 for tokens of no message: the last four of a table
    codes += np.where(codes < 0, np.repeat(sizes[number], counts), 0)
    codes = codes + np.repeat(starts[number], counts)
    mask = np.concatenate([table.mask for table in distinct] or [np.zeros(0, np.uint8)])[codes]
    rules = np.concatenate([table.rules for table in distinct] or [np.zeros(0, np.uint8)])[codes]
    stops = _stops(kinds, offsets)
    _finish_stops(mask, rules, offsets[:-1] + stops, stops >= 0, turns, distinct, number, starts, policy)
    firsts = offsets[:-1]
    mask[firsts] |= LOSS
    rules[firsts] = RULE["bos"]
    return Documents(places, tokens, mask, rules, offsets, stops.astype(np.int32), batch.num_straddlers[places])


def _stops(kinds: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[D], `stop_index` of every document; none of them is empty."""
    if len(offsets) == 1:
        return np.zeros(0, np.int64)
    numbers = np.arange(len(kinds))
    is_end = (kinds == TokenKind.END_OF_TURN) | (kinds == TokenKind.EOS)
    last_end = np.maximum.reduceat(np.where(is_end, numbers, -1), offsets[:-1])
    last_content = np.maximum.reduceat(np.where(kinds == TokenKind.CONTENT, numbers, -1), offsets[:-1])
    return np.where(last_content < last_end, last_end - offsets[:-1], -1)


def _finish_stops(
    mask: npt.NDArray[np.uint8],
    rules: npt.NDArray[np.uint8],
    places: npt.NDArray[np.int64],
    has_stop: npt.NDArray[np.bool_],
    turns: npt.NDArray[np.int32],
    tables: Sequence[Any],
    number: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    policy: MaskPolicy,
) -> None:
    """The token that ends each document, by `eos.train_on_eos` and the weight of its message."""
    places = places[has_stop]
    turn = turns[places]
    weights = np.concatenate([table.weights for table in tables] or [np.zeros(0, np.float32)])
    own = np.where(turn >= 0, weights[starts[number[has_stop]] + np.maximum(turn, 0) * 4 + TokenKind.CONTENT], 0)
    rule = policy.eos.train_on_eos
    trained = {w: stop_weight("all" if rule == "last" else rule, w, policy.eos) != 0 for w in (0.0, 1.0)}
    is_trained = np.where(own != 0, trained[1.0], trained[0.0])
    mask[places] = np.where(is_trained, mask[places] & ~LOSS, mask[places] | LOSS)
    rules[places] = RULE["eos"]

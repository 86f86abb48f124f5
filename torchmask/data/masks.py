"""Which tokens of a rendered conversation are trained, at what weight, which are hidden, and which rule said so.

Everything is decided by a token's kind, its message and the characters it covers (`Rendered`), never by its id: a
model in which EOS and end of turn share one id, or a user who types one, changes nothing.

Nearly all conversations need no more than a look-up by message and kind, which is what `decide` does first; characters
are looked at only where a part of a message has its own say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from torchmask.data.eos import DEFAULT_EOS, EosPolicy, TrainOnStop
from torchmask.data.policy import LOSS, RULE, MaskingStrategy, MaskPolicy, stop_weight, trained_turns, turn_weights
from torchmask.data.span_masks import SpanCount, decide_by_characters
from torchmask.data.spans import speaks_in_part
from torchmask.errors import ConfigError
from torchmask.messages import Message, Rendered, TokenKind

__all__ = [
    "Decision",
    "MaskPolicy",
    "MaskingStrategy",
    "append_eos",
    "decide",
    "finish_chat",
    "mask_of",
    "stop_index",
    "trained_turns",
]


@dataclass(frozen=True)
class Decision:
    """What was decided of a document.

    Attributes:
        mask: [n] uint8 of `MaskFlag`.
        weights: [n] float32, 0 where masked; None where every target's is 1.
        rules: [n] uint8, index into `rule_names`: which rule decided the token.
        rule_names: the policy's rules.
        stop: place of the token that ends the document; -1 for none.
        straddlers: tokens that reach over the edge of a span or part.
        spans: what each span rule found.
    """

    mask: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32] | None
    rules: npt.NDArray[np.uint8]
    rule_names: tuple[str, ...]
    stop: int = -1
    straddlers: int = 0
    spans: list[SpanCount] = field(default_factory=list)

    @property
    def unmatched(self) -> list[str]:
        """Span rules that matched nothing, or nothing that a token covers."""
        return [count.name for count in self.spans if not count.tokens]

    @property
    def is_unmatched(self) -> bool:
        """Whether there is nothing to learn because a rule that would train what it selects selects no token."""
        return any(s.trains and not s.tokens for s in self.spans) and bool((self.mask[1:] & LOSS).all())


@dataclass(frozen=True)
class Table:
    """By `4 * message + kind`, the last four for tokens of no message."""

    weights: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]
    rules: npt.NDArray[np.uint8]
    is_weighted: bool


def decide(
    rendered: Rendered, messages: Sequence[Message], policy: MaskPolicy, *, only: range | None = None
) -> Decision:
    """What is trained and seen of a document, and why.

    The first token is never a target, since nothing precedes it.

    Args:
        rendered: the document.
        messages: all of its conversation's, also those behind the rendered ones.
        policy: the rules.
        only: messages that may be trained; others are prompt, whatever the rules say.

    Raises:
        DataError: the template rewrites a message whose parts have their own say, or `straddle` is `error` (D14).

    >>> r = Rendered(np.array([1, 5, 6, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([-1, 0, 1, 1]))
    >>> d = decide(r, [Message("user", "a"), Message("assistant", "b")], MaskPolicy())
    >>> d.mask.tolist(), [d.rule_names[i] for i in d.rules]
    ([1, 1, 0, 0], ['bos', 'strategy', 'strategy', 'eos'])
    """
    decided = turn_weights(messages, policy)
    kinds, turns = rendered.kinds, rendered.turns
    stop = stop_index(rendered)
    if not policy.spans and not policy.train_on_header and only is None and not any(map(speaks_in_part, messages)):
        table = table_of(tuple(decided), policy)
        codes = turns * 4 + kinds
        mask, rules = table.mask[codes], table.rules[codes]
        weights = table.weights[codes] if table.is_weighted else None
        straddlers, counts = 0, list[SpanCount]()
    else:
        weights, mask, rules, straddlers, counts, silent = decide_by_characters(rendered, messages, policy, decided)
        decided = [(0.0, rule) if turn in silent else (own, rule) for turn, (own, rule) in enumerate(decided)]
    if stop >= 0 or policy.eos.for_eot == "last":
        weights = _finish_stops(mask, weights, rules, kinds, turns, stop, decided, policy)
    if only is not None:
        outside = (turns < only.start) | (turns >= only.stop)
        rules[outside & (mask & LOSS == 0)] = RULE["prompt"]
        mask[outside] |= LOSS
    mask[:1] |= LOSS
    rules[:1] = RULE["bos"]
    if weights is not None:
        weights = np.where(mask & LOSS, np.float32(0), weights)
        if (weights[mask & LOSS == 0] == 1).all():
            weights = None
    return Decision(mask, weights, rules, policy.rule_names, stop, straddlers, counts)


def table_of(decided: tuple[tuple[float, int], ...], policy: MaskPolicy) -> "Table":
    """What the rules say of tokens by `4 * message + kind`, for messages of these weights (`turn_weights`)."""
    if decided in policy.tables:
        return policy.tables[decided]
    if len(policy.tables) > 1000:  # weights that differ from row to row
        policy.tables.clear()
    weights: list[float] = []
    rules: list[int] = []
    for weight, rule in (*decided, (0.0, RULE[policy.base])):
        weights += [0.0, weight, stop_weight(policy.eos.for_eot, weight, policy.eos), 0.0]
        rules += [RULE["header"], rule, RULE["eot"], RULE["eos"]]
    as_array = np.array(weights, np.float32)
    mask = (as_array == 0).astype(np.uint8)
    is_weighted = any(weight not in (0.0, 1.0) for weight in weights) or policy.eos.weight != 1
    table = Table(as_array, mask, np.array(rules, np.uint8), is_weighted)
    policy.tables[decided] = table
    return table


def _finish_stops(
    mask: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None,
    rules: npt.NDArray[np.uint8],
    kinds: npt.NDArray[np.uint8],
    turns: npt.NDArray[np.int32],
    stop: int,
    decided: Sequence[tuple[float, int]],
    policy: MaskPolicy,
) -> npt.NDArray[np.float32] | None:
    """Sets the token that ends the document and, for `last`, the last end of turn; the weights, if they are needed."""
    places: list[tuple[int, str, TrainOnStop]] = []
    if policy.eos.for_eot == "last":
        last = kinds.tobytes().rfind(TokenKind.END_OF_TURN)
        places += [(last, "eot", policy.eos.for_eot)] if last >= 0 else []
    places += [(stop, "eos", policy.eos.train_on_eos)] if stop >= 0 else []
    for place, name, rule in places:
        turn = int(turns[place])
        weight = stop_weight("all" if rule == "last" else rule, decided[turn][0] if turn >= 0 else 0.0, policy.eos)
        mask[place] = (mask[place] & ~LOSS) | (LOSS if weight == 0 else np.uint8(0))
        rules[place] = RULE[name]
        if weights is None and weight not in (0.0, 1.0):
            weights = np.ones(len(mask), np.float32)
        if weights is not None:
            weights[place] = weight
    return weights


def mask_of(rendered: Rendered, messages: Sequence[Message], policy: MaskPolicy) -> npt.NDArray[np.uint8]:
    """[n] uint8 of `MaskFlag`: the mask that `decide` comes to.

    >>> r = Rendered(np.array([1, 5, 6, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([-1, 0, 1, 1]))
    >>> mask_of(r, [Message("user", "a"), Message("assistant", "b")], MaskPolicy()).tolist()
    [1, 1, 0, 0]
    """
    return decide(rendered, messages, policy).mask


def stop_index(rendered: Rendered) -> int:
    """Place of the token that ends the document, its EOS or last end of turn; -1 where content follows or none is.

    >>> stop_index(Rendered(np.array([1, 5, 2, 9]), np.array([0, 1, 2, 0], np.uint8), np.array([-1, 0, 0, 0])))
    2
    """
    kinds = rendered.kinds.tobytes()  # a search in bytes is several times as fast as numpy on so few
    end = max(kinds.rfind(TokenKind.END_OF_TURN), kinds.rfind(TokenKind.EOS))
    return end if kinds.rfind(TokenKind.CONTENT) < end else -1


def append_eos(rendered: Rendered, eos_id: int, *, turn: int) -> Rendered:
    """The document with EOS at its end, which belongs to message `turn`; unchanged where it has one already.

    >>> once = append_eos(Rendered(np.array([1, 5]), np.array([0, 1], np.uint8), np.array([-1, 0])), 2, turn=0)
    >>> once.tokens.tolist(), once.kinds.tolist(), len(append_eos(once, 2, turn=0))
    ([1, 5, 2], [0, 1, 3], 3)
    """
    if len(rendered) and rendered.kinds[-1] == TokenKind.EOS:
        return rendered
    end = np.int32(sum(len(piece.text) for piece in rendered.pieces or ()))
    return Rendered(
        np.append(rendered.tokens, np.int32(eos_id)),
        np.append(rendered.kinds, np.uint8(TokenKind.EOS)),
        np.append(rendered.turns, np.int32(turn)),
        rendered.num_straddlers,
        None if rendered.content_starts is None else np.append(rendered.content_starts, np.int32(-1)),
        None if rendered.content_ends is None else np.append(rendered.content_ends, np.int32(-1)),
        rendered.pieces,
        None if rendered.starts is None else np.append(rendered.starts, end),
        None if rendered.ends is None else np.append(rendered.ends, end),
    )


def finish_chat(
    rendered: Rendered, messages: Sequence[Message], eos_id: int | None, eos: EosPolicy = DEFAULT_EOS
) -> Rendered:
    """The conversation with the EOS that `eos.append` asks for, which follows its last message.

    `auto` and `virtual` append nothing where the last message's own end of turn ends the document, where that turn goes
    on (`eot=False`), or where the last word is not the assistant's. Otherwise the template has no end of turn at all,
    and without an EOS the model would never learn to stop. `always` appends one unless the document ends in one.

    Raises:
        ConfigError: `always`, and the tokenizer has no EOS (C09).
    """
    if eos.append == "never" or not messages:
        return rendered
    last = len(messages) - 1
    if eos.append == "always":
        if eos_id is None:
            raise ConfigError("C09", "eos.append is always, and the tokenizer has no EOS", fix="set eos.append to auto")
        stop = stop_index(rendered)
        # The place of the stop token is known; whether it is written as EOS is a fact of the tokenizer (Qwen's is).
        is_eos = stop >= 0 and int(rendered.tokens[stop]) == eos_id
        return rendered if is_eos else append_eos(rendered, eos_id, turn=last)
    if eos_id is None or messages[-1].role != "assistant" or not messages[-1].eot:
        return rendered
    is_end = (rendered.kinds == TokenKind.END_OF_TURN) | (rendered.kinds == TokenKind.EOS)
    if (is_end & (rendered.turns == last)).any():
        return rendered
    return append_eos(rendered, eos_id, turn=last)

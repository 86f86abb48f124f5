"""Masks below the level of messages: headers, content parts, character ranges and span rules.

One list of claims a message, in order of precedence; each claims characters of the message's text and says what becomes
of the tokens that cover them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmask.data.policy import BASE_RULES, HIDDEN, LOSS, MaskPolicy, detail_weight, stop_weight
from torchmask.data.spans import Range, part_ranges, speaks_in_part
from torchmask.data.turn_text import Tokens, TurnText, cut_pieces, tokens_of
from torchmask.errors import DataError
from torchmask.messages import Message, Piece, Rendered, TokenKind, said_weight

_HEADER, _PART, _EOT, _EOS = (BASE_RULES.index(name) for name in ("header", "part", "eot", "eos"))


class SpanCount(NamedTuple):
    """What one span rule found in one document: places, and the tokens they are; `trains` = these would be targets."""

    name: str
    places: int
    tokens: int
    trains: bool = False


_Columns = tuple[
    npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.uint8], int, list[SpanCount], set[int]
]  # weights, mask, rules, straddlers, counts, silent messages


class Claim(NamedTuple):
    """What a rule says of characters of a message's text in the rendering.

    Attributes:
        ranges: the characters.
        rule: index of its name.
        weight: None = leaves the loss as it is.
        visible: whether later tokens may attend to them; None = leaves that as it is.
        base: for `train: only`, the weight of the text around; None = as it was.
        span: index of the span rule, -1 for what a row says itself.
    """

    ranges: Sequence[Range]
    rule: int
    weight: float | None
    visible: bool | None
    base: float | None = None
    span: int = -1


def decide_by_characters(
    rendered: Rendered, messages: Sequence[Message], policy: MaskPolicy, decided: Sequence[tuple[float, int]]
) -> _Columns:
    """The columns of `decide`, before the document's stop token is set.

    A message of which only a span is trained, and in which none is found, is silent: its end is not trained either.

    Args:
        rendered, messages, policy: as for `decide`.
        decided: weight and rule of each message as a whole.

    Raises:
        DataError: as for `decide`.
    """
    weights, rules = _by_message(rendered, decided, policy)
    mask = np.zeros(len(rendered), np.uint8)
    found = [[0, 0] for _ in policy.rules]
    straddling: set[int] = set()
    silent: set[int] = set()
    present = set(rendered.turns.tolist())
    for turn, message in enumerate(messages):
        if turn not in present or not _is_claimed(message, policy):
            continue
        text, tokens = _located(rendered, turn)
        is_cleared = False
        for claim in claims(message, text, policy):
            if claim.base is not None:
                is_cleared |= claim.span >= 0
                weights[tokens.places], rules[tokens.places] = claim.base, claim.rule
            chosen, over = _chosen(tokens, claim.ranges, policy, message)
            straddling.update(tokens.places[over].tolist())
            places = tokens.places[chosen]
            if claim.weight is not None:
                weights[places], rules[places] = claim.weight, claim.rule
            if claim.visible is not None:
                mask[places] = mask[places] & ~HIDDEN if claim.visible else mask[places] | HIDDEN
            if claim.span >= 0:
                found[claim.span][0] += len(claim.ranges)
                found[claim.span][1] += len(places)
        if is_cleared and not weights[tokens.places].any():
            silent.add(turn)
            if policy.eos.for_eot == "turn":
                weights[(rendered.turns == turn) & (rendered.kinds == TokenKind.END_OF_TURN)] = 0
    mask[weights == 0] |= LOSS
    counts = [
        SpanCount(name, places, tokens, bool(rule.own_weight))
        for (name, rule), (places, tokens) in zip(policy.rules, found, strict=True)
    ]
    return weights, mask, rules, len(straddling), counts, silent


def _by_message(
    rendered: Rendered, decided: Sequence[tuple[float, int]], policy: MaskPolicy
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Weights and rules by message and kind alone."""
    message_weights = np.array([*(weight for weight, _ in decided), 0], np.float32)
    message_rules = np.array([*(rule for _, rule in decided), 0], np.uint8)
    of_stops = np.array(
        [*(stop_weight(policy.eos.for_eot, weight, policy.eos) for weight, _ in decided), 0], np.float32
    )
    kinds, turns = rendered.kinds, rendered.turns
    is_eot = kinds == TokenKind.END_OF_TURN
    weights = np.where(kinds == TokenKind.CONTENT, message_weights[turns], np.float32(0))
    weights = np.where(is_eot, of_stops[turns], weights).astype(np.float32)
    rules = np.where(kinds == TokenKind.CONTENT, message_rules[turns], np.uint8(_HEADER))
    rules = np.where(is_eot, np.uint8(_EOT), np.where(kinds == TokenKind.EOS, np.uint8(_EOS), rules)).astype(np.uint8)
    if policy.train_on_header and policy.masking_strategy == "train_on_all" and policy.roles_to_train is None:
        message_weights[-1] = 1  # everything: labels are a copy of the inputs
        weights = np.where(kinds == TokenKind.STRUCTURE, message_weights[turns], weights)
    elif policy.train_on_header:
        # A header stands before its message's text; what follows an end of turn (ChatML's line break) is none.
        begun = np.full(len(decided) + 1, len(rendered))
        for place in np.flatnonzero(kinds != TokenKind.STRUCTURE)[::-1].tolist():
            begun[turns[place]] = place
        begun[-1] = 0
        is_header = (kinds == TokenKind.STRUCTURE) & (np.arange(len(rendered)) < begun[turns])
        weights = np.where(is_header, message_weights[turns], weights)
    return weights, rules


def _is_claimed(message: Message, policy: MaskPolicy) -> bool:
    if speaks_in_part(message):
        return True
    return any(named.rule.looks_at(message.role) for named in policy.rules)


def _located(rendered: Rendered, turn: int) -> tuple[TurnText, Tokens]:
    if rendered.pieces is None:
        raise DataError("D14", "the tokenizer does not say which characters its tokens cover",
                        fix="span rules and flags of parts need a tokenizer that does")  # fmt: skip
    text = TurnText(rendered.pieces, turn)
    return text, tokens_of(rendered, turn, text)


def claims(message: Message, text: TurnText, policy: MaskPolicy) -> list[Claim]:
    """All that is said of parts of a message, in order of precedence; spans that match nothing have no ranges."""
    size = len(message.text)
    said: list[Claim] = []
    if not message.visible:
        said.append(Claim([(0, len(text.text))], BASE_RULES.index("message"), None, False))
    for part, (start, end) in part_ranges(message):
        weight = said_weight(part.get("masked"), part.get("train"), part.get("weight"))
        visible = part.get("visible")
        visible = None if visible and message.visible else visible  # nothing has hidden it
        if (weight is not None or visible is not None) and start < end:
            said.append(Claim(text.from_own(message, start, end), _PART, weight, visible))
    if message.train_detail:
        if message.own_weight is None and any(detail_weight(d) is not None for d in message.train_detail):
            said.append(Claim([], _PART, None, None, 0.0))  # what no range covers is not trained, as in Axolotl
        for detail in message.train_detail:
            start, end = max(0, int(detail["begin_offset"])), min(size, int(detail["end_offset"]) + 1)
            ranges = text.from_own(message, start, end) if start < end else []
            said.append(Claim(ranges, _PART, detail_weight(detail), detail.get("visible")))
    goes_on = False  # whether the last rule that spoke of the loss was an `only` too
    for i, (_, rule) in enumerate(policy.rules):
        if not rule.looks_at(message.role):
            continue
        if rule.chars is None and rule.part is None:
            ranges = rule.find(text.text)
        else:
            ranges = [place for start, end in rule.find_own(message) for place in text.from_own(message, start, end)]
        is_only = rule.train == "only"
        base = 0.0 if is_only and not goes_on else None
        said.append(Claim(ranges, len(BASE_RULES) + i, rule.own_weight, rule.visible, base, i))
        goes_on = is_only or (goes_on and rule.own_weight is None)
    return said


def _chosen(
    tokens: Tokens, ranges: Sequence[Range], policy: MaskPolicy, message: Message
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """[m] bool each: the tokens that belong to the ranges, and those that reach over an edge of one."""
    chosen, over = np.zeros(len(tokens.places), np.bool_), np.zeros(len(tokens.places), np.bool_)
    for start, end in ranges:
        touches, straddles = tokens.over(start, end)
        over |= straddles
        chosen |= touches & ~straddles if policy.straddle == "inside" else touches
    if policy.straddle == "error" and over.any():
        first = int(np.flatnonzero(over)[0])
        covered = f"characters {int(tokens.starts[first])} to {int(tokens.ends[first])}"
        raise DataError(
            "D14",
            f"a token ({covered} of the {message.role}'s text) reaches over the edge of a span at "
            f"{', '.join(f'{s} to {e}' for s, e in ranges[:3])}",
            fix="set straddle to overlap, inside or split",
        )
    return chosen, over


def split_at_edges(pieces: Sequence[Piece], messages: Sequence[Message], policy: MaskPolicy) -> list[Piece]:
    """The pieces with cuts where spans and texts begin and end, for `straddle: split`."""
    cut = [_apart_from_header(pieces, i) for i in range(len(pieces))]
    for turn, message in enumerate(messages):
        if not _is_claimed(message, policy):
            continue
        text = TurnText(cut, turn)
        edges = [edge for claim in claims(message, text, policy) for place in claim.ranges for edge in place]
        cut = cut_pieces(cut, turn, text, edges)
    return cut


def _apart_from_header(pieces: Sequence[Piece], i: int) -> Piece:
    """A piece of content that follows structure begins a token of its own, and the other way round."""
    piece = pieces[i]
    if i == 0 or piece.is_token or pieces[i - 1].is_token:
        return piece
    is_edge = (piece.kind == TokenKind.CONTENT) != (pieces[i - 1].kind == TokenKind.CONTENT)
    return piece._replace(apart=True) if is_edge else piece

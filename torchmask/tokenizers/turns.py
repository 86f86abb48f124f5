"""The turns that were located in a template's output, and the output cut into pieces by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torchmask.messages import Message, TokenKind
from torchmask.tokenizers.pieces import Piece
from torchmask.tokenizers.shield import Shield


class Span(NamedTuple):
    """Characters `[start, end)` of a rendering that are a message's own from its character `offset` on.

    An offset of -1 is that of a text of which the template has dropped the beginning.
    """

    start: int
    end: int
    offset: int


class Token(NamedTuple):
    """A control token in a rendering: characters `[start, end)`."""

    start: int
    end: int
    text: str


@dataclass
class Turn:
    """Where a message is in a rendering.

    Attributes:
        content: its text as given, perhaps without the blanks around it; None where the template rewrites or drops it.
        reasoning: the same of its reasoning.
        calls_end: a place in its last call; None where it has none, or none that was found.
        begin: where the part begins that counts as its content (all that a model writes, for an answer); None where the
            message is nowhere.
        end: where that part ends.
        end_token: the token that ends the turn, if there is one.
        served: whether the text in front of `begin` is what generation would be fed.
    """

    content: Span | None
    reasoning: Span | None = None
    calls_end: int | None = None
    begin: int | None = None
    end: int = 0
    end_token: Token | None = None
    served: bool = True

    @property
    def own(self) -> list[Span]:
        """What is located of its text and its reasoning."""
        return [span for span in (self.content, self.reasoning) if span is not None]


def in_text_order(turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """`(begin, index)` of the located turns by where they are; a template may move a system message behind others."""
    return sorted((turn.begin, i) for i, turn in enumerate(turns) if turn.begin is not None)


def cut_into_pieces(
    text: str, turns: Sequence[Turn], tokens: Sequence[Token], messages: Sequence[Message], *, shield: Shield, eos: str
) -> list[Piece]:
    """The rendering cut at control tokens and at the edges of turns and of their contents.

    Structure belongs to the turn that follows it; text right after an end-of-turn token belongs to the turn before.
    Messages with `eot=False` lose their end-of-turn token and that text.
    """
    located = in_text_order(turns)
    edges = {0, len(text)}.union(*((t.start, t.end) for t in tokens))
    for begin, i in located:
        edges |= {begin, turns[i].end}.union(*(span[:2] for span in turns[i].own))
    token_at = {token.start: token for token in tokens}

    pieces: list[Piece] = []
    current = -1  # the turn that began last
    num_begun = 0
    is_trailing = False
    for start, end in pairwise(sorted(edges)):
        while num_begun < len(located) and located[num_begun][0] <= start:
            current, num_begun, is_trailing = located[num_begun][1], num_begun + 1, False
        next_begin, following = located[num_begun] if num_begun < len(located) else (len(text) + 1, -1)
        token = token_at.get(start)
        words = token.text if token else shield.show(text[start:end])
        is_token = token is not None

        if current >= 0 and start < turns[current].end:
            offset = _offset_in_content(text, start, turns[current], shield)
            served = turns[current].served
            pieces.append(Piece(words, TokenKind.CONTENT, current, is_token, offset, served=served))
        elif current >= 0 and token is not None and token == turns[current].end_token:
            is_trailing = True
            if messages[current].eot:
                pieces.append(Piece(words, TokenKind.END_OF_TURN, current, True, served=turns[current].served))
        elif is_trailing and not is_token and end < next_begin:
            is_trailing = False
            if messages[current].eot:
                pieces.append(Piece(words, TokenKind.STRUCTURE, current))
        else:
            is_trailing = False
            ends_document = is_token and words == eos and current >= 0 and following < 0
            pieces.append(Piece(words, TokenKind.EOS if ends_document else TokenKind.STRUCTURE, following, is_token))
    return pieces


def _offset_in_content(text: str, start: int, turn: Turn, shield: Shield) -> int:
    """Where in what the message says itself a place in the rendering is; -1 where the template wrote that place."""
    for span in turn.own:
        if span.start <= start < span.end and span.offset >= 0:
            return span.offset + len(shield.show(text[span.start : start]))
    return -1


def ways_to_mark(contents: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Which part of each text to put between marks, in order of preference; an empty part at -1 means no marks.

    Templates may test for empty text, so there is each way with marks around such, and without.
    """
    whole = [(0, len(content)) for content in contents]
    stripped = [(len(content) - len(content.lstrip()), len(content.rstrip())) for content in contents]
    cores = [(begin, max(begin, end)) for begin, end in stripped]
    ways: list[list[tuple[int, int]]] = []
    for way in (whole, _but_empty(whole), cores, _but_empty(cores)):
        ways += [way] if way not in ways else []
    return ways


def _but_empty(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(begin, end) if end > begin else (-1, -1) for begin, end in parts]


def marked_text(content: str, begin: int, end: int, first: str, last: str) -> str:
    """A text with a mark at either end of a part of it; as it is where `begin` is below 0."""
    return content if begin < 0 else content[:begin] + first + content[begin:end] + last + content[end:]

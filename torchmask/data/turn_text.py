"""The text of one message as a rendering has it, with the characters that its tokens cover.

A rendering knows characters, so a span is located once, by characters, and the tokens follow: never by searching for
ids, never by tokenising a piece alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmask.errors import DataError
from torchmask.messages import Message, Piece, Rendered, TokenKind


class Stretch(NamedTuple):
    """A piece of a message: where it begins in the rendering and in the message's text there, and its own offset."""

    begin: int
    at: int
    size: int
    offset: int


class TurnText:
    """One message in a rendering.

    Attributes:
        text: what the template made of it, without the blanks that it put around.
    """

    def __init__(self, pieces: Sequence[Piece], turn: int) -> None:
        own: list[tuple[int, Piece]] = []
        begin = 0
        for piece in pieces:
            if piece.turn == turn and piece.kind == TokenKind.CONTENT and piece.text:
                own.append((begin, piece))
            begin += len(piece.text)
        while own and own[0][1].offset < 0 and not own[0][1].text.strip():
            own.pop(0)
        while own and own[-1][1].offset < 0 and not own[-1][1].text.strip():
            own.pop()
        self.text = "".join(piece.text for _, piece in own)
        sizes = [len(piece.text) for _, piece in own]
        places = np.cumsum([0, *sizes])[:-1].tolist()
        self.stretches = [Stretch(b, at, len(p.text), p.offset) for (b, p), at in zip(own, places)]

    def from_rendering(self, chars: npt.NDArray[np.int32], *, is_end: bool) -> npt.NDArray[np.int64]:
        """[m] places in `text` of characters of the rendering; those in between and around move to the nearest."""
        if not self.stretches:
            return np.zeros(len(chars), np.int64)
        begins = np.array([s.begin for s in self.stretches])
        k = np.maximum(np.searchsorted(begins, chars, side="left" if is_end else "right") - 1, 0)
        sizes = np.array([s.size for s in self.stretches])[k]
        places = np.array([s.at for s in self.stretches])[k]
        moved: npt.NDArray[np.int64] = places + np.clip(chars - begins[k], 0, sizes)
        return moved

    def from_own(self, message: Message, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges of `text` that are the characters `[start, end)` of the message's own text, or of its reasoning.

        Characters of the reasoning are counted on from the text's; a template may have left them out.

        Raises:
            DataError: the template rewrites the text, so that nobody can say which they are (D14).
        """
        size = len(message.text)
        is_reasoning = start >= size
        located = [s for s in self.stretches if s.offset >= 0 and (s.offset >= size) == is_reasoning]
        if not located:
            located = self._found(message, is_reasoning=is_reasoning)
        ranges = []
        for stretch in located:
            first, last = max(start, stretch.offset), min(end, stretch.offset + stretch.size)
            if first < last:
                ranges.append((stretch.at + first - stretch.offset, stretch.at + last - stretch.offset))
        return ranges

    def _found(self, message: Message, *, is_reasoning: bool) -> list[Stretch]:
        """The message's text or reasoning in a rendering that was made of it in other ways than by copying."""
        own = message.reasoning_text if is_reasoning else message.text
        core = own.strip()
        if is_reasoning and core not in self.text:
            return []
        if not core or self.text.count(core) != 1:
            raise DataError(
                "D14",
                f"the chat template rewrites the {message.role}'s text, so that its characters and parts cannot be "
                "told apart in what it writes",
                fix="use a regex, tag or json_path rule, which look at what the template writes",
            )
        offset = own.index(core) + (len(message.text) if is_reasoning else 0)
        return [Stretch(0, self.text.index(core), len(core), offset)]


class Tokens(NamedTuple):
    """The tokens of a message's text.

    Attributes:
        places: [m] where they are in the document.
        starts, ends: [m] the characters of `TurnText.text` that each covers.
    """

    places: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def over(self, start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """[m] bool each: which tokens share characters with `[start, end)`, and which of these reach over its edges."""
        touches = (self.starts < end) & (self.ends > start)
        empty = self.starts == self.ends  # stands for no character, such as sentencepiece's blank on its own
        touches |= empty & (self.starts >= start) & (self.starts < end)
        return touches, touches & ((self.starts < start) | (self.ends > end))


def tokens_of(rendered: Rendered, turn: int, text: TurnText) -> Tokens:
    """The tokens of message `turn` that are content."""
    assert rendered.starts is not None and rendered.ends is not None
    mine = (rendered.turns == turn) & (rendered.kinds == TokenKind.CONTENT)
    places = np.flatnonzero(mine)
    starts = text.from_rendering(rendered.starts[places], is_end=False)
    ends = text.from_rendering(rendered.ends[places], is_end=True)
    return Tokens(places, starts, np.maximum(starts, ends))


def cut_pieces(pieces: Sequence[Piece], turn: int, text: TurnText, edges: Sequence[int]) -> list[Piece]:
    """The pieces with a cut at each of the places `edges` in the message's text, over which no token may reach."""
    begins = sorted({s.begin + e - s.at for e in edges for s in text.stretches if s.at <= e <= s.at + s.size})
    result: list[Piece] = []
    at = 0
    for piece in pieces:
        stop = at + len(piece.text)
        cuts = [c for c in begins if at <= c < stop]
        if piece.is_token or not cuts:
            result.append(piece)
        else:
            bounds = sorted({at, *cuts, stop})
            for a, b in pairwise(bounds):
                offset = piece.offset + a - at if piece.offset >= 0 else -1
                apart = a in cuts or (a == at and piece.apart)
                result.append(piece._replace(text=piece.text[a - at : b - at], offset=offset, apart=apart))
        at = stop
    return result

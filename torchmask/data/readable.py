"""Token ids as a person should read them, whatever a vocabulary's way of spelling white space and bytes.

Vocabularies spell in one of three ways: sentencepiece (`▁the`, `<0x0A>`), GPT-2's byte alphabet (`Ġthe`, `Ċ`) or plain
text. Which one shows in the pieces themselves, so nothing has to be known of the tokenizer but the spelling of an id.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

_WHITE = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\u00a0": "⍽"})
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Readable:
    """The text of ids, as exact text of a run or one by one with marks for what would not be seen.

    Args:
        ids: every id that will be asked for.
        id_to_piece: a tokenizer's spelling of an id.
        control: the texts of control tokens by id, in place of their pieces; without it a piece that is not of the
            vocabulary's alphabet counts as one.

    Attributes:
        control: the same.

    >>> read = Readable([3, 5, 6], {3: "▁the", 5: "<0x0A>", 6: "▁▁"}.__getitem__)
    >>> read.visible(3), read.visible(5), read.visible(6), read.text([3, 5])
    (' the', '⏎\\n', '␣␣', ' the\\n')
    """

    def __init__(
        self, ids: Iterable[int], id_to_piece: Callable[[int], str], control: Mapping[int, str] | None = None
    ) -> None:
        self.control = dict(control or {})
        pieces = {i: self.control.get(i) or id_to_piece(i) for i in sorted(set(ids))}
        everything = "".join(piece for i, piece in pieces.items() if i not in self.control)
        to_bytes: Callable[[str], bytes] = _plain_bytes
        if "▁" in everything:
            to_bytes = _sentencepiece_bytes
        elif "Ġ" in everything or "Ċ" in everything:
            to_bytes = _byte_level_bytes(_byte_characters())
        self._bytes = {i: (_plain_bytes if i in self.control else to_bytes)(piece) for i, piece in pieces.items()}
        self._visible = {i: _marked(data.decode(errors="backslashreplace")) for i, data in self._bytes.items()}

    def visible(self, id: int) -> str:
        """One token: real blanks inside a word, marks for white space alone, line breaks, lone bytes and nothing."""
        return self._visible[id]

    def text(self, ids: Sequence[int]) -> str:
        """The exact text of a run; bytes that are no whole character are written `\\xc3`."""
        return b"".join(self._bytes[i] for i in ids).decode(errors="backslashreplace")


def _plain_bytes(piece: str) -> bytes:
    return piece.encode(errors="backslashreplace")


def _sentencepiece_bytes(piece: str) -> bytes:
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else _plain_bytes(piece.replace("▁", " "))


def _byte_level_bytes(characters: dict[str, int]) -> Callable[[str], bytes]:
    def to_bytes(piece: str) -> bytes:
        if not all(c in characters for c in piece):
            return _plain_bytes(piece)  # a control token, spelled as it is
        return bytes(characters[c] for c in piece)

    return to_bytes


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte: itself if printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _marked(text: str) -> str:
    """White space that would not be seen gets a mark; a line break keeps breaking the line after its mark.

    A single blank has none: many vocabularies write it before a word that they spell in pieces.

    >>> [_marked(t) for t in (" the", " ", "  ", "\\n", "")]
    [' the', ' ', '␣␣', '⏎\\n', '∅']
    """
    if not text:
        return "∅"
    if len(text) > 1 and text.strip(" ") == "":
        return "␣" * len(text)
    return "".join(c if c.isprintable() or c in "\n\t\r\u00a0" else f"\\x{ord(c):02x}" for c in text).translate(_WHITE)

"""What a tokenizer library has to offer, and the arithmetic from its bytes to characters of the text.

A back end turns plain text into ids and back. It never reads a control token out of text: ids of control tokens come
only from whoever builds a conversation. Everything else (BOS, chat formats, masks) is the same for all back ends and
lives above them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from torchmask.errors import DataError

IntArray = npt.NDArray[np.int32]


class Encoded(NamedTuple):
    """Ids of a text and the characters each token covers: `text[starts[i]:ends[i]]`; three [n] int32 arrays.

    A token inside a multi-byte character covers that character; a token that stands for no character of the text
    (sentencepiece's dummy prefix on its own) has `starts[i] == ends[i]`.
    """

    ids: IntArray
    starts: IntArray
    ends: IntArray


class EncodedTexts(NamedTuple):
    """Many texts encoded, each alone, one after the other in flat arrays.

    Attributes:
        ids, starts, ends: [n] int32 as in `Encoded`; characters are counted from the start of each text.
        offsets: [T + 1] int64; text i has the tokens `offsets[i]:offsets[i + 1]`.
    """

    ids: IntArray
    starts: IntArray
    ends: IntArray
    offsets: npt.NDArray[np.int64]

    @classmethod
    def join(cls, texts: "Sequence[Encoded]") -> "EncodedTexts":
        """Texts that were encoded one by one."""
        none = np.zeros(0, np.int32)
        ids, starts, ends = (np.concatenate(column) for column in zip((none, none, none), *texts))
        return cls(ids, starts, ends, offsets_of([len(text.ids) for text in texts]))


def offsets_of(sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """[T + 1] int64, where each of T consecutive parts of these sizes begins, and the end of the last."""
    offsets = np.zeros(np.size(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


class Blanks(NamedTuple):
    """Which blanks around a control token belong to it (`lstrip` and `rstrip` of an added token)."""

    before: bool
    after: bool


class Backend(Protocol):
    """A tokenizer library behind one face.

    Attributes:
        vocab_size: one more than the largest id.
        specials: control tokens by their text, never made from text.
        markers: added tokens by their text that the file does not call special but that look like control tokens
            (Qwen's `<think>`); not made from text either.
        bos, eos, pad: the text of these tokens as the model file names them, None where it does not.
        stops: further tokens at which generation stops, as far as the model file's format fixes them.
        swallows: the control tokens that take in blanks around them, which then are in no other token.
        middle: the back end for text that follows another token, where only the text at the very beginning gets the
            blank that sentencepiece puts in front; else None.
    """

    vocab_size: int
    specials: Mapping[str, int]
    markers: Mapping[str, int]
    bos: str | None
    eos: str | None
    pad: str | None
    stops: Sequence[str]
    swallows: Mapping[str, Blanks]

    @property
    def middle(self) -> "Backend | None":
        """See above."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no BOS or EOS."""

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1, in_characters: bool = True) -> EncodedTexts:
        """What `encode_with_offsets` says of each text, in far fewer steps of Python; texts are never joined into one.

        Args:
            texts: any number of them.
            num_threads: threads the library may use, where it lets itself be told.
            in_characters: False = starts and ends may be counted in bytes of the text, where that is cheaper.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""

    def id_to_piece(self, id: int) -> str:
        """The token as its file spells it."""

    def piece_to_id(self, piece: str) -> int | None:
        """The token that its file spells so, control tokens left aside; None where there is none."""


# HTML tags are ordinary vocabulary in Gemma, although they are added tokens of the same shape as control tokens.
_HTML = r"/?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)"
_MARKER = re.compile(rf"<(?!{_HTML}>)[^<>\s][^<>]*>|\[[^\[\]\s]+\]|<｜[^<>]+｜>")


def looks_like_marker(text: str) -> bool:
    """Whether an added token is written like a control token; runs of blanks and HTML tags are not.

    >>> [looks_like_marker(t) for t in ("<think>", "<|im_end|>", "[INST]", "</table>", "\\n\\n", "    ")]
    [True, True, True, False, False, False]
    """
    return _MARKER.fullmatch(text) is not None


def utf8(text: str) -> bytes:
    """The text as UTF-8.

    Raises:
        DataError: D02, the text holds half of a surrogate pair (JSON's `\\ud83d` alone), which no tokenizer can encode.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        bad = ord(text[error.start])
        raise DataError(
            "D02",
            f"the text holds a lone surrogate U+{bad:04X} at character {error.start}, which is not valid Unicode",
            fix="mend or remove the row; on_bad_row: skip leaves such rows out",
        ) from None


def byte_spans_to_char_spans(data: bytes, byte_ends: npt.NDArray[np.int64]) -> tuple[IntArray, IntArray]:
    """Characters covered by consecutive byte spans of `data` that end at `byte_ends` [n]; starts, ends [n] int32.

    >>> byte_spans_to_char_spans("aé".encode(), np.array([1, 2, 3]))
    (array([0, 1, 1], dtype=int32), array([1, 2, 2], dtype=int32))
    """
    byte_starts = np.concatenate(([0], byte_ends[:-1])) if len(byte_ends) else byte_ends
    if data.isascii():
        return byte_starts.astype(np.int32), byte_ends.astype(np.int32)
    is_first_byte = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    char_of_byte = np.cumsum(is_first_byte, dtype=np.int32)  # 1-based character that each byte belongs to
    before = np.concatenate((char_of_byte, char_of_byte[-1:] + 1)) - 1  # character that starts at or holds a position
    after = np.concatenate((np.zeros(1, np.int32), char_of_byte))  # characters begun before a position
    starts = before[byte_starts]
    return starts, np.maximum(after[byte_ends], starts)

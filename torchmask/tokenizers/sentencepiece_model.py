"""Back end for sentencepiece's `tokenizer.model`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError
from torchmask.tokenizers.backend import (
    Backend,
    Blanks,
    Encoded,
    EncodedTexts,
    byte_spans_to_char_spans,
    looks_like_marker,
    offsets_of,
    utf8,
)

# A user-defined piece of marker's shape in the protobuf: field 1 (length, text), 2 (score, a float), 3 (type, 4 = user
# defined). The text's bytes exclude control characters, so that a match cannot run on into the next piece.
_USER_DEFINED = re.compile(rb"\x0a([\x03-\x7f])([<\[][\x21-\x7e\x80-\xff]{1,124}[>\]])(\x15(?s:.{4})\x18)\x04")
_CONTROL = b"\x03"
_NORMALIZER_FIELD, _DUMMY_PREFIX = 0x1A, b"\x18"  # normalizer_spec of the model; add_dummy_prefix in it


class SentencePieceModel:
    """A sentencepiece model.

    sentencepiece finds user-defined pieces in any text, Gemma's `<start_of_turn>` too. Those that are written like
    control tokens are made control pieces before the model is loaded, which is what keeps them out of typed text
    and leaves all other ids as they are.

    Args:
        path: of the file.
        control: pieces that the folder's configuration calls special, which become control pieces too (Code Llama's
            `▁<PRE>` is an ordinary piece of its file).
        prefix: `always` takes the model's word on whether a blank is put in front of every text; `first` puts it only
            in front of what begins a text, not after a token (transformers' `legacy: false`); `never`.

    Raises:
        ConfigError: C11, the file is not a sentencepiece model.
    """

    def __init__(self, path: Path, *, control: Iterable[str] = (), prefix: str = "always") -> None:
        import sentencepiece

        data, retyped = _user_markers_as_control(path.read_bytes())
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            edited = data
            for text in control:
                id = self._model.piece_to_id(text)
                if self._model.id_to_piece(id) == text and not self._is_control(id):
                    edited = _as_control(edited, text)
            if prefix == "never":
                edited = _without_dummy_prefix(edited)
            if edited is not data:
                self._model = sentencepiece.SentencePieceProcessor(model_proto=edited)
        except Exception as error:
            raise ConfigError("C11", f"not a sentencepiece model: {error}", where=str(path)) from None
        self._path, self._control, self._prefix = path, tuple(control), prefix
        model = self._model
        self.vocab_size: int = model.vocab_size()
        self._pieces: list[str] = model.id_to_piece(list(range(self.vocab_size)))
        is_control = [self._is_control(i) for i in range(self.vocab_size)]
        self.specials: Mapping[str, int] = {piece: i for i, piece in enumerate(self._pieces) if is_control[i]}
        assert all(text in self.specials for text in retyped)
        self.markers: Mapping[str, int] = {}
        self.bos, self.eos, self.pad = (self._name(i) for i in (model.bos_id(), model.eos_id(), model.pad_id()))
        self.stops: Sequence[str] = ()
        self.swallows: Mapping[str, Blanks] = {}
        is_byte = [model.is_byte(i) for i in range(self.vocab_size)]
        self._piece_bytes = np.array([1 if byte else len(p.encode()) for p, byte in zip(self._pieces, is_byte)])
        self._unknown: int = model.unk_id()
        # A model that removes blanks says that what is left of them comes from the first character it kept.
        self._moves_starts = model.normalize("  a", with_offsets=True)[1][0] != 0

    @cached_property
    def middle(self) -> Backend | None:
        """The same without a blank in front, for text after another token; None where every text gets it."""
        if self._prefix != "first":
            return None
        return SentencePieceModel(self._path, control=self._control, prefix="never")

    def _is_control(self, id: int) -> bool:
        return self._model.is_control(id) or self._model.is_unknown(id)

    def _name(self, id: int) -> str | None:
        return self._pieces[id] if id >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        utf8(text)
        return self._model.encode(text)

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        return Encoded(*self.encode_many([text])[:3])

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1, in_characters: bool = True) -> EncodedTexts:
        """The same for each of many texts."""
        for text in texts:
            utf8(text)
        ids_of = self._model.encode(list(texts), num_threads=num_threads) if texts else []
        offsets = offsets_of([len(ids) for ids in ids_of])
        ids = np.fromiter(chain.from_iterable(ids_of), np.int32, int(offsets[-1]))
        # Pieces tile the normalised text (dummy prefix and U+2581 included), whose characters know their origins.
        normalized, origins = self._normalize(texts)
        sizes = self._piece_bytes[ids]
        for i in np.unique(np.searchsorted(offsets, np.flatnonzero(ids == self._unknown), side="right") - 1):
            # An unknown piece is as long as the characters it stands for.
            here = slice(offsets[i], offsets[i + 1])
            pieces: list[str] = self._model.encode(texts[i], out_type=str)
            sizes[here] = np.where(ids[here] == self._unknown, [len(piece.encode()) for piece in pieces], sizes[here])
        data = "".join(normalized).encode()
        byte_ends = np.cumsum(sizes)
        is_tiled = byte_ends[-1] == len(data) if len(ids) else not data
        assert is_tiled, "sentencepiece's pieces do not tile its normalised text"
        starts, ends = byte_spans_to_char_spans(data, byte_ends)
        # Each text has one origin more than characters, that of its end.
        before = np.repeat(np.arange(len(texts)), np.diff(offsets))
        return EncodedTexts(ids, origins[starts + before], origins[ends + before], offsets)

    def _normalize(self, texts: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int32]]:
        """The normalised texts, and where each of their characters (and their ends) comes from in its own text.

        Where only the dummy prefix and U+2581 are new, which is nearly always, that is known without asking.
        """
        normalized: list[str] = self._model.normalize(list(texts)) if texts else []
        origins = []
        for text, result in zip(texts, normalized):
            shown = text.replace(" ", "\u2581")
            if result == shown and not self._moves_starts:
                origins.append(np.arange(len(text) + 1, dtype=np.int32))
            elif result == "\u2581" + shown and not self._moves_starts:
                origins.append(np.arange(-1, len(text) + 1, dtype=np.int32).clip(0))
            else:
                origins.append(np.array(self._model.normalize(text, with_offsets=True)[1], dtype=np.int32))
        return normalized, np.concatenate([*origins, np.zeros(0, np.int32)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        return self._model.decode(list(ids))

    def id_to_piece(self, id: int) -> str:
        """The token as the file spells it."""
        return self._pieces[id]

    def piece_to_id(self, piece: str) -> int | None:
        """The token that the file spells so, None where there is none."""
        id: int = self._model.piece_to_id(piece)
        return id if self._pieces[id] == piece and piece not in self.specials else None


def _user_markers_as_control(data: bytes) -> tuple[bytes, list[str]]:
    """The model with its marker-like user-defined pieces typed as control pieces, and their texts."""
    retyped: list[str] = []

    def retype(match: re.Match[bytes]) -> bytes:
        text = match[2].decode(errors="replace")
        if len(match[2]) != match[1][0] or not looks_like_marker(text):
            return match[0]
        retyped.append(text)
        return b"\x0a" + match[1] + match[2] + match[3] + _CONTROL

    return _USER_DEFINED.sub(retype, data), retyped


def _as_control(data: bytes, text: str) -> bytes:
    """The model with one ordinary or user-defined piece typed as a control piece."""
    name = text.encode()
    if len(name) > 100:  # lengths in the protobuf are then more than a byte
        return data
    body = b"\x0a" + bytes([len(name)]) + name
    found = re.compile(rb"\x0a([\x00-\x7f])(" + re.escape(body) + rb"\x15(?s:.{4}))(\x18.)?")

    def retype(match: re.Match[bytes]) -> bytes:
        size = len(match[2]) + len(match[3] or b"")
        if match[1][0] != size:
            return match[0]
        return b"\x0a" + bytes([len(match[2]) + 2]) + match[2] + b"\x18" + _CONTROL

    return found.sub(retype, data)


def _without_dummy_prefix(data: bytes) -> bytes:
    """The model with `add_dummy_prefix` off: a field that comes later in a protobuf wins, so one is added."""
    at = 0
    while at < len(data):
        tag = data[at]
        size, start = _varint(data, at + 1)
        if tag & 7 != 2:
            raise ValueError("not a sentencepiece model's protobuf")
        if tag == _NORMALIZER_FIELD:
            body = data[start : start + size] + _DUMMY_PREFIX + b"\x00"
            return data[:at] + bytes([tag]) + _as_varint(len(body)) + body + data[start + size :]
        at = start + size
    return data


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of the protobuf at a place, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return value, at + 1
        at, shift = at + 1, shift + 7


def _as_varint(value: int) -> bytes:
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])

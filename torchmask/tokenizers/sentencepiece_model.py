"""Back end for sentencepiece's `tokenizer.model`."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError
from torchmask.tokenizers.backend import (
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


class SentencePieceModel:
    """A sentencepiece model.

    sentencepiece finds user-defined pieces in any text, Gemma's `<start_of_turn>` too. Those that are written like
    control tokens are made control pieces before the model is loaded, which is what keeps them out of typed text
    and leaves all other ids as they are.

    Raises:
        ConfigError: C11, the file is not a sentencepiece model.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        data, retyped = _user_markers_as_control(path.read_bytes())
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:
            raise ConfigError("C11", f"not a sentencepiece model: {error}", where=str(path)) from None
        model = self._model
        self.vocab_size: int = model.vocab_size()
        self._pieces: list[str] = model.id_to_piece(list(range(self.vocab_size)))
        is_control = [model.is_control(i) or model.is_unknown(i) for i in range(self.vocab_size)]
        self.specials: Mapping[str, int] = {piece: i for i, piece in enumerate(self._pieces) if is_control[i]}
        assert all(text in self.specials for text in retyped)
        self.markers: Mapping[str, int] = {}
        self.bos, self.eos, self.pad = (self._name(i) for i in (model.bos_id(), model.eos_id(), model.pad_id()))
        self.stops: Sequence[str] = ()
        is_byte = [model.is_byte(i) for i in range(self.vocab_size)]
        self._piece_bytes = np.array([1 if byte else len(p.encode()) for p, byte in zip(self._pieces, is_byte)])
        self._unknown: int = model.unk_id()
        # A model that removes blanks says that what is left of them comes from the first character it kept.
        self._moves_starts = model.normalize("  a", with_offsets=True)[1][0] != 0

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

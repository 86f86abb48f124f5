"""Back end for the `tokenizers` library: `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt`."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError, DataError
from torchmask.tokenizers.backend import (
    Encoded,
    EncodedTexts,
    byte_spans_to_char_spans,
    looks_like_marker,
    offsets_of,
    utf8,
)


class TokenizerJson:
    """A tokenizer of the `tokenizers` library.

    The library keeps only those added tokens out of typed text that are flagged special, and only when asked to; every
    added token that is written like a control token is flagged here, so that Qwen's `<tool_call>` is text when a user
    types it. Added tokens that are ordinary vocabulary (runs of blanks, HTML tags) stay as they are.

    Raises:
        ConfigError: C11, the file cannot be read.
    """

    def __init__(self, *paths: Path) -> None:
        from tokenizers import AddedToken

        try:
            self._tokenizer = _byte_level_bpe(*paths) if len(paths) == 2 else _from_file(*paths)
        except Exception as error:
            raise ConfigError("C11", f"cannot be read as a tokenizer: {error}", where=str(paths[0])) from None
        tokenizer = self._tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        self.specials: Mapping[str, int] = {token.content: id for id, token in added if token.special}
        self.markers: Mapping[str, int] = {
            t.content: id for id, t in added if not t.special and looks_like_marker(t.content)
        }
        if self.markers:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.markers])
        tokenizer.encode_special_tokens = True
        self.vocab_size = max(tokenizer.get_vocab_size(), 1 + max((id for id, _ in added), default=-1))
        self.bos: str | None = None  # the file does not say
        self.eos: str | None = None
        self.pad: str | None = None
        self.stops: Sequence[str] = ()
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._is_never_text = np.zeros(self.vocab_size, bool)
        self._is_never_text[[id for t, id in (*self.specials.items(), *self.markers.items()) if t != unknown]] = True
        self._token_bytes = _bytes_of_tokens(tokenizer, self.vocab_size) if _is_byte_level(tokenizer) else None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        return Encoded(*self.encode_many([text])[:3])

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1, in_characters: bool = True) -> EncodedTexts:
        """The same for each of many texts; the library takes as many threads as RAYON_NUM_THREADS says."""
        for text in texts:
            utf8(text)
        if self._token_bytes is None:
            return EncodedTexts.join([self._encode_slowly(text) for text in texts])
        ids_of = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        offsets = offsets_of([len(ids) for ids in ids_of])
        ids = np.fromiter(chain.from_iterable(ids_of), np.int32, int(offsets[-1]))
        self._refuse_control(ids)
        # Tokens tile the bytes of a text, unless the library normalised it or an added token swallowed blanks.
        data = [text.encode() for text in texts]
        byte_offsets = offsets_of([len(d) for d in data])
        ends_of_tokens = np.concatenate(([0], np.cumsum(self._token_bytes[ids])))
        if (np.diff(ends_of_tokens[offsets]) != np.diff(byte_offsets)).any():
            return EncodedTexts.join([self._encode_alone(text) for text in texts])
        starts, ends = byte_spans_to_char_spans(b"".join(data), ends_of_tokens[1:])
        base = np.repeat(offsets_of([len(text) for text in texts])[:-1].astype(np.int32), np.diff(offsets))
        return EncodedTexts(ids, starts - base, ends - base, offsets)

    def _encode_alone(self, text: str) -> Encoded:
        """One text by `encode_many` if its tokens tile it, else by the library's own offsets."""
        assert self._token_bytes is not None
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        byte_ends, data = np.cumsum(self._token_bytes[ids]), text.encode()
        if (byte_ends[-1] if len(ids) else 0) != len(data):
            return self._encode_slowly(text)
        return Encoded(ids, *byte_spans_to_char_spans(data, byte_ends))

    def _encode_slowly(self, text: str) -> Encoded:
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        return Encoded(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def _encode(self, text: str) -> Any:
        utf8(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        self._refuse_control(np.array(encoding.ids, np.int32))
        return encoding

    def _refuse_control(self, ids: npt.NDArray[np.int32]) -> None:
        """Stops where text became a control token, as a model whose own vocabulary holds them (Unigram) makes it."""
        bad = ids[self._is_never_text[ids]]
        if len(bad):
            raise DataError(
                "D13",
                f"the text holds {self.id_to_piece(int(bad[0]))!r}, which this tokenizer cannot encode as plain text",
                fix="remove it from the row",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def id_to_piece(self, id: int) -> str:
        """The token as the file spells it."""
        piece = self._tokenizer.id_to_token(id)
        if piece is None:
            raise IndexError(f"the tokenizer has no token {id}")
        return piece


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are spelled in GPT-2's alphabet of one character a byte, over a text that is at most composed."""

    def parts(step: Any, key: str) -> list[dict[str, Any]]:
        state = {} if step is None else json.loads(step.__getstate__())
        return state[key] if state.get("type") == "Sequence" else [state]

    normalizers = {part.get("type") for part in parts(tokenizer.normalizer, "normalizers")}
    splits = parts(tokenizer.pre_tokenizer, "pretokenizers")
    known = {"ByteLevel", "Split", "Digits"}
    return (
        type(tokenizer.model).__name__ == "BPE"
        and normalizers <= {None, "NFC"}
        and any(part.get("type") == "ByteLevel" for part in splits)
        and all(part.get("type") in known and not part.get("add_prefix_space") for part in splits)
        and all(part.get("behavior", "Isolated") == "Isolated" for part in splits if part["type"] == "Split")
    )


def _bytes_of_tokens(tokenizer: Any, vocab_size: int) -> npt.NDArray[np.int64]:
    """[vocab_size] int64, how many bytes of a text each token stands for."""
    sizes = np.zeros(vocab_size, np.int64)
    for piece, id in tokenizer.get_vocab(with_added_tokens=False).items():
        sizes[id] = len(piece)
    for id, token in tokenizer.get_added_tokens_decoder().items():
        sizes[id] = len(token.content.encode())
    return sizes


def _byte_level_bpe(vocab: Path, merges: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>")
    control = [text for text in names if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer

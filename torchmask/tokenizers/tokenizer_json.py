"""Back end for the `tokenizers` library: `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmask.errors import ConfigError, DataError
from torchmask.tokenizers.backend import Encoded, looks_like_marker, utf8


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
        self._never_text = {id for text, id in (*self.specials.items(), *self.markers.items()) if text != unknown}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        return Encoded(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def _encode(self, text: str) -> Any:
        utf8(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._never_text.isdisjoint(encoding.ids):  # a model whose own vocabulary holds control tokens (Unigram)
            found = next(self.id_to_piece(id) for id in encoding.ids if id in self._never_text)
            raise DataError(
                "D13",
                f"the text holds {found!r}, which this tokenizer cannot encode as plain text",
                fix="remove it from the row",
            )
        return encoding

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


def _byte_level_bpe(vocab: Path, merges: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>")
    control = [text for text in names if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer

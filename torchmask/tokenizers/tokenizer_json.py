"""Back end for the `tokenizers` library: `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt`."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError, DataError
from torchmask.tokenizers.added_tokens import AddedToken, NamedTokens
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
from torchmask.tokenizers.library_state import (
    decodes_bytes,
    hidden_text,
    is_byte_level,
    leading_ids,
    prefixes_first_only,
    read_file,
    unknown_id,
    with_prefix_setting,
    without_prefix,
    without_texts,
)


class TokenizerJson:
    """A tokenizer of the `tokenizers` library.

    The library keeps only those added tokens out of typed text that are flagged special, and only when asked to; every
    added token that is written like a control token is flagged here, so that Qwen's `<tool_call>` is text when a user
    types it. A model's own vocabulary may still hold them (Unigram's does); there they get a name that nobody types.
    Added tokens that are ordinary vocabulary (runs of blanks, HTML tags) stay as they are.

    Args:
        tokenizer: the library's; it is changed.
        where: its file, for messages.
        named: tokens that the folder's configuration names; those with a role count as special, and those that the
            file lacks are added.

    Attributes:
        leading: the ids that the file's post-processor puts in front of a text; None where it has none for that.
    """

    def __init__(self, tokenizer: Any, *, where: str, named: NamedTokens | None = None) -> None:
        self._where = where
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.leading = leading_ids(tokenizer)
        tokenizer.post_processor = None  # it adds BOS, or takes blanks off offsets
        self._tokenizer = tokenizer
        self.bos: str | None = None  # the file does not say
        self.eos: str | None = None
        self.pad: str | None = None
        self.stops: Sequence[str] = ()
        self._hidden: dict[str, AddedToken] = {}
        # Added tokens that the file does not call special, and that are flagged special in the library here.
        self._marker_ids: set[int] = set()
        named = named or NamedTokens()
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._add_to_library([token for token in named.tokens if token.text not in added])
        self._add_named(named)
        self._index()
        leaking = self._leaking()
        if leaking:
            self._hide(leaking)
            self._index()

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        config: Mapping[str, Any],
        named: NamedTokens | None = None,
        edit: Callable[[Any], Any] | None = None,
    ) -> "TokenizerJson":
        """The tokenizer in a `tokenizer.json`.

        Args:
            config: tokenizer_config.json, whose `add_prefix_space` has the last word.
            named: see the class.
            edit: changes the library's tokenizer first.

        Raises:
            ConfigError: C11, the file cannot be read.
        """
        tokenizer = with_prefix_setting(read_file(path), config)
        tokenizer = tokenizer if edit is None else edit(tokenizer)
        return cls(tokenizer, where=str(path), named=named)

    def _add_to_library(self, tokens: Sequence[AddedToken]) -> None:
        from tokenizers import AddedToken as Added

        for t in tokens:
            flags = {"lstrip": t.lstrip, "rstrip": t.rstrip, "single_word": t.single_word, "normalized": t.normalized}
            self._tokenizer.add_tokens([Added(t.text, special=t.special, **flags)])
            id = self._tokenizer.token_to_id(t.text)
            if t.id >= 0 and id != t.id:
                raise ConfigError(
                    "C11",
                    f"the configuration gives the added token {t.text!r} the id {t.id}, in the file it would have {id}",
                    where=self._where,
                    fix="use the tokenizer's files of one and the same model",
                )

    def _add_named(self, named: NamedTokens) -> None:
        """Tokens with a role or in a list are special; those that are not there are added, but for BOS and EOS."""
        added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        special = []
        for text, token in named.names.items():
            if text in added:
                if not added[text].special and looks_like_marker(text):
                    special.append(_special(added[text]))
            elif (self._tokenizer.token_to_id(text) is None and text not in named.ends) or (
                self._tokenizer.token_to_id(text) is not None and looks_like_marker(text)
            ):
                self._add_to_library([token._replace(special=True)])
        if special:
            self._tokenizer.add_special_tokens(special)

    def _index(self) -> None:
        """What follows from the library's state."""
        tokenizer = self._tokenizer
        added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        hidden = {token.id: token for token in self._hidden.values()}
        specials = {token.content: id for id, token in added.items() if token.special and id not in self._marker_ids}
        markers = {t.content: id for id, t in added.items() if t.content not in specials and _is_marker(t)}
        if any(not added[id].special for id in markers.values()):
            self._marker_ids |= set(markers.values())
            tokenizer.add_special_tokens([_special(added[id]) for id in markers.values()])
        specials |= {token.text: id for id, token in hidden.items() if token.special}
        markers |= {token.text: id for id, token in hidden.items() if not token.special}
        self.specials: Mapping[str, int] = dict(sorted(specials.items(), key=lambda item: item[1]))
        self.markers: Mapping[str, int] = dict(sorted(markers.items(), key=lambda item: item[1]))
        control = {*specials, *markers}
        blanks = [(t.content, t.lstrip, t.rstrip) for t in added.values()]
        blanks += [(t.text, t.lstrip, t.rstrip) for t in hidden.values()]
        self.swallows: Mapping[str, Blanks] = {
            text: Blanks(before, after) for text, before, after in blanks if text in control and (before or after)
        }
        tokenizer.encode_special_tokens = True
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        self.vocab_size = 1 + max([*vocab.values(), *added, *hidden], default=-1)
        self._is_never_text = np.zeros(self.vocab_size, bool)
        self._is_never_text[[*self.specials.values(), *self.markers.values()]] = True
        unknown = unknown_id(tokenizer)
        if unknown is not None:
            self._is_never_text[unknown] = False
        # The decoder of GPT-2's alphabet takes the letters of added tokens, too, for bytes, so it must not see them.
        decoded = decodes_bytes(tokenizer)
        self._plain_texts = {id: t.content for id, t in added.items() if decoded and not t.content.isascii()}
        self._token_bytes = _bytes_of_tokens(vocab, added, self.vocab_size) if is_byte_level(tokenizer) else None

    def _leaking(self) -> list[AddedToken]:
        """Control tokens that the model makes from their text."""
        control = {**self.specials, **self.markers}
        found = self._tokenizer.encode_batch_fast(list(control), add_special_tokens=False)
        leaking = [text for text, encoding in zip(control, found) if control[text] in encoding.ids]
        flags = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        return [
            AddedToken(text, control[text], text in self.specials, flags[text].lstrip, flags[text].rstrip)
            for text in leaking
        ]

    def _hide(self, tokens: Sequence[AddedToken]) -> None:
        """Gives these entries of the model's own vocabulary names that nobody types."""
        self._hidden |= {token.text: token for token in tokens}
        self._tokenizer = without_texts(self._tokenizer, {token.text: token.id for token in tokens})

    def add(self, tokens: Sequence[AddedToken]) -> None:
        """Puts tokens behind the vocabulary.

        Raises:
            ConfigError: C11, the library would give one another id.
        """
        self._add_to_library(tokens)
        self._index()
        self.__dict__.pop("middle", None)

    @cached_property
    def middle(self) -> Backend | None:
        """The same without a blank in front, for text after another token; None where every text gets it, or none."""
        if not prefixes_first_only(self._tokenizer):
            return None
        other = TokenizerJson.__new__(TokenizerJson)
        other.__dict__.update({**self.__dict__, "_tokenizer": without_prefix(self._tokenizer), "middle": None})
        return other

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
        """Stops where text became a control token after all."""
        bad = ids[self._is_never_text[ids]]
        if len(bad):
            raise DataError(
                "D13",
                f"the text holds {self.id_to_piece(int(bad[0]))!r}, which this tokenizer cannot encode as plain text",
                fix="remove it from the row",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        if not self._plain_texts:
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)
        parts: list[str] = []
        for is_plain, run in groupby(ids, key=self._plain_texts.__contains__):
            if is_plain:
                parts += [self._plain_texts[id] for id in run]
            else:
                parts.append(self._tokenizer.decode(list(run), skip_special_tokens=False))
        return "".join(parts)

    def id_to_piece(self, id: int) -> str:
        """The token as the file spells it."""
        piece = self._tokenizer.id_to_token(id)
        if piece is None:
            raise IndexError(f"the tokenizer has no token {id}")
        if self._hidden:
            return next((text for text, token in self._hidden.items() if hidden_text(token.id) == piece), piece)
        return piece

    def piece_to_id(self, piece: str) -> int | None:
        """The token that the file spells so, None where there is none."""
        held = piece in self.specials or piece in self.markers
        return None if held else self._tokenizer.token_to_id(piece)


def _is_marker(token: Any) -> bool:
    return looks_like_marker(token.content)


def _special(token: Any) -> Any:
    """An added token with the flag that keeps it out of typed text."""
    from tokenizers import AddedToken as Added

    return Added(
        token.content,
        special=True,
        normalized=False,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _bytes_of_tokens(vocab: Mapping[str, int], added: Mapping[int, Any], vocab_size: int) -> npt.NDArray[np.int64]:
    """[vocab_size] int64, how many bytes of a text each token stands for."""
    sizes = np.zeros(vocab_size, np.int64)
    for piece, id in vocab.items():
        sizes[id] = len(piece)
    for id, token in added.items():
        sizes[id] = len(token.content.encode())
    return sizes

"""Tokens that a folder names beside the tokenizer's own file, and a back end with such tokens.

They are in `added_tokens_decoder` of tokenizer_config.json (with their flags), in added_tokens.json, and by name alone
in the roles and lists of tokenizer_config.json and special_tokens_map.json; those without an id come after the
vocabulary in that order, as transformers numbers them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchmask.errors import ConfigError
from torchmask.messages import Message, Piece, TokenKind
from torchmask.tokenizers.backend import Backend, Blanks, Encoded, EncodedTexts, looks_like_marker
from torchmask.tokenizers.json_files import read_json

CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class AddedToken(NamedTuple):
    """A token that stands beside a vocabulary.

    Attributes:
        special: a control token, which decoding may leave out.
        lstrip, rstrip: the token takes in the blanks before it, after it.
        single_word: not found inside words.
        normalized: searched for in the normalised text.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def is_control(self) -> bool:
        """Whether it is never made from text."""
        return self.special or looks_like_marker(self.text)

    def as_json(self) -> dict[str, Any]:
        """As `added_tokens_decoder` has it."""
        return {
            "content": self.text,
            "lstrip": self.lstrip,
            "normalized": self.normalized,
            "rstrip": self.rstrip,
            "single_word": self.single_word,
            "special": self.special,
        }


class NamedTokens(NamedTuple):
    """What a folder's configuration files say of tokens.

    Attributes:
        tokens: those with an id, by it.
        names: those that have a role or are listed, by their text, with flags (`id` is -1).
        ends: texts of BOS and EOS, which must be in the tokenizer's files, or listed; others are added as needed.
    """

    tokens: tuple[AddedToken, ...] = ()
    names: Mapping[str, AddedToken] = {}
    ends: tuple[str, ...] = ()


def read_named_tokens(folder: Path) -> NamedTokens:
    """The tokens that a folder's configuration files name.

    Raises:
        ConfigError: C10, a file is not what it should be; C11, two tokens with one id.
    """
    config = {**read_json(folder / MAP_FILE), **read_json(folder / CONFIG_FILE)}
    try:
        listed = {token.text: token for token in _listed(config)}
        roles = {key: _token(config[key], -1, special=True) for key in _ROLES if config.get(key) is not None}
        names = {**{token.text: token for token in roles.values()}, **listed}
        ends = tuple(roles[key].text for key in _ROLES[:2] if key in roles and roles[key].text not in listed)
        tokens = {
            int(id): _token(entry, int(id), special=False)
            for id, entry in (config.get("added_tokens_decoder") or {}).items()
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"added tokens are not in the form that transformers writes: {error!r}"
        raise ConfigError("C10", message, where=str(folder / CONFIG_FILE)) from None
    texts = {token.text for token in tokens.values()}
    for text, id in read_json(folder / ADDED_FILE).items():
        if not isinstance(id, int) or id < 0:
            raise ConfigError("C10", f"the id of {text!r} is {id!r}", where=str(folder / ADDED_FILE))
        if text in texts:
            continue
        if id in tokens:
            message = f"{text!r} and {tokens[id].text!r} have the same id {id}"
            raise ConfigError("C11", message, where=str(folder / ADDED_FILE))
        tokens[id] = names[text]._replace(id=id) if text in names else AddedToken(text, id, special=False)
    return NamedTokens(tuple(tokens[id] for id in sorted(tokens)), names, ends)


def _listed(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    for key in _LISTS:
        listed = config.get(key) or ()
        for entry in listed.values() if isinstance(listed, dict) else listed:
            yield _token(entry, -1, special=True)


def _token(entry: str | Mapping[str, Any], id: int, *, special: bool) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry, id, special=special)
    flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
    return AddedToken(str(entry["content"]), id, bool(entry.get("special", special)), **flags)


def missing_tokens(named: NamedTokens, backend: Backend) -> list[AddedToken]:
    """The tokens that a folder names and a back end has not, or has under another name or as ordinary text."""
    held = {**backend.specials, **backend.markers}
    missing = [token for token in named.tokens if held.get(token.text) != token.id and not _is_piece(backend, token)]
    texts = {*held, *(token.text for token in named.tokens)}
    free = max([backend.vocab_size, *(token.id + 1 for token in named.tokens)])
    for text, token in named.names.items():
        if text in texts or text in named.ends:
            continue
        ids = backend.encode(text)
        if len(ids) == 1 and backend.id_to_piece(ids[0]) == text:
            continue  # an ordinary token in a role
        missing.append(token._replace(id=free))
        free += 1
    return missing


def _is_piece(backend: Backend, token: AddedToken) -> bool:
    """Whether an ordinary token is in the vocabulary already."""
    return not token.is_control and token.id < backend.vocab_size and backend.id_to_piece(token.id) == token.text


class WithAddedTokens:
    """A back end with tokens that its own file does not hold; names given to ids that it has replace its own.

    Tokens that are neither special nor written like control tokens are found in text, the longest first; what is
    between them is encoded alone.
    """

    def __init__(self, inner: Backend, tokens: Sequence[AddedToken]) -> None:
        self._inner, self._tokens = inner, tuple(tokens)
        named = {token.id: token for token in tokens}
        control = [token for token in tokens if token.is_control]
        self.vocab_size = max([inner.vocab_size, *(token.id + 1 for token in tokens)])
        self.specials: Mapping[str, int] = {
            **{text: id for text, id in inner.specials.items() if id not in named},
            **{token.text: token.id for token in control if token.special},
        }
        self.markers: Mapping[str, int] = {
            **{text: id for text, id in inner.markers.items() if id not in named},
            **{token.text: token.id for token in control if not token.special},
        }
        self.swallows: Mapping[str, Blanks] = {
            **inner.swallows,
            **{t.text: Blanks(t.lstrip, t.rstrip) for t in control if t.lstrip or t.rstrip},
        }
        ids = {**inner.specials, **inner.markers}

        def renamed(text: str | None) -> str | None:
            return named[ids[text]].text if text is not None and ids[text] in named else text

        self.bos, self.eos, self.pad = renamed(inner.bos), renamed(inner.eos), renamed(inner.pad)
        self.stops: Sequence[str] = [text for text in map(renamed, inner.stops) if text is not None]
        self._texts = {token.id: token.text for token in tokens}
        self._ordinary = {token.text: token for token in tokens if not token.is_control}
        self._find = re.compile("|".join(re.escape(text) for text in sorted(self._ordinary, key=len, reverse=True)))

    @cached_property
    def middle(self) -> "Backend | None":
        """The same for text that follows a token, where the inner back end tells them apart."""
        return None if self._inner.middle is None else WithAddedTokens(self._inner.middle, self._tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text makes a control token."""
        if not self._ordinary:
            return self._inner.encode(text)
        ids: list[int] = []
        for start, end, token in self._cut(text):
            ids += [token.id] if token else self._at(start).encode(text[start:end])
        return ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """The ids of `encode` with the characters each token covers."""
        if not self._ordinary:
            return self._inner.encode_with_offsets(text)
        parts = [Encoded(*(np.zeros(0, np.int32) for _ in range(3)))]
        for start, end, token in self._cut(text):
            if token is not None:
                parts.append(Encoded(*(np.array([value], np.int32) for value in (token.id, start, end))))
            else:
                ids, starts, ends = self._at(start).encode_with_offsets(text[start:end])
                parts.append(Encoded(ids, starts + np.int32(start), ends + np.int32(start)))
        return Encoded(*map(np.concatenate, zip(*parts)))

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1, in_characters: bool = True) -> EncodedTexts:
        """What `encode_with_offsets` says of each text."""
        if not self._ordinary or not any(map(self._find.search, texts)):
            return self._inner.encode_many(texts, num_threads=num_threads, in_characters=in_characters)
        return EncodedTexts.join([self.encode_with_offsets(text) for text in texts])

    def _at(self, start: int) -> Backend:
        return self._inner if start == 0 or self._inner.middle is None else self._inner.middle

    def _cut(self, text: str) -> Iterator[tuple[int, int, AddedToken | None]]:
        """Stretches `[start, end)` of the text, with the added token that each is, if it is one."""
        done = 0
        for match in self._find.finditer(text):
            token = self._ordinary[match[0]]
            start, end = match.span()
            if token.single_word and (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip()))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            if start < done:
                continue
            if start > done:
                yield done, start, None
            yield start, end, token
            done = end
        if done < len(text):
            yield done, len(text), None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are no control tokens."""
        if not any(id in self._texts for id in ids):
            return self._inner.decode(ids)
        parts: list[str] = []
        run: list[int] = []
        for id in [*ids, -1]:
            if id != -1 and id not in self._texts:
                run.append(id)
                continue
            if run:
                parts.append(self._at(len(parts)).decode(run))
                run = []
            parts += [self._texts[id]] if id != -1 else []
        return "".join(parts)

    def id_to_piece(self, id: int) -> str:
        """The token as its file spells it."""
        return self._texts[id] if id in self._texts else self._inner.id_to_piece(id)

    def piece_to_id(self, piece: str) -> int | None:
        """The token that a file spells so, None where there is none."""
        return self._ordinary[piece].id if piece in self._ordinary else self._inner.piece_to_id(piece)


def swallow_blanks(pieces: Sequence[Piece], swallows: Mapping[str, Blanks]) -> list[Piece]:
    """The pieces without the blanks that control tokens take in, as Phi-3's `<|end|>` does with the line break after.

    transformers finds such tokens together with the blanks around them, so those are in no other token.
    """
    result = list(pieces)
    for i, piece in enumerate(pieces):
        blanks = swallows.get(piece.text) if piece.is_token else None
        if blanks is None:
            continue
        at = i
        while blanks.after and (at := at + 1) < len(result) and not result[at].is_token:
            text = result[at].text
            kept = text.lstrip()
            offset = result[at].offset
            moved = offset + len(text) - len(kept) if offset >= 0 else offset
            result[at] = result[at]._replace(text=kept, offset=moved)
            if kept:
                break
        at = i
        while blanks.before and (at := at - 1) >= 0 and not result[at].is_token:
            result[at] = result[at]._replace(text=result[at].text.rstrip())
            if result[at].text:
                break
    return [piece for piece in result if piece.text]


def tokens_in_answers(pieces: Sequence[Piece], messages: Sequence[Message], find: re.Pattern[str]) -> list[Piece]:
    """The pieces with control tokens for what `find` matches in the assistant's own text."""
    result: list[Piece] = []
    for piece in pieces:
        own = not piece.is_token and piece.kind == TokenKind.CONTENT and messages[piece.turn].role == "assistant"
        at = 0
        for match in find.finditer(piece.text) if own else ():
            parts = [(at, match.start(), False), (*match.span(), True)]
            result += [_part(piece, start, end, is_token) for start, end, is_token in parts if end > start]
            at = match.end()
        if at < len(piece.text) or not piece.text:
            result.append(_part(piece, at, len(piece.text), piece.is_token))
    return result


def _part(piece: Piece, start: int, end: int, is_token: bool) -> Piece:
    offset = piece.offset + start if piece.offset >= 0 else piece.offset
    return piece._replace(text=piece.text[start:end], is_token=is_token, offset=offset)

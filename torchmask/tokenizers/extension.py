"""Tokens that a user adds to a tokenizer: which they are, and where a chat has them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torchmask.errors import ConfigError, DataError
from torchmask.messages import Message
from torchmask.tokenizers.added_tokens import CONFIG_FILE, AddedToken, WithAddedTokens
from torchmask.tokenizers.backend import Backend
from torchmask.tokenizers.json_files import read_json
from torchmask.tokenizers.saving import ADDED_KEY
from torchmask.tokenizers.template_format import TemplateFormat
from torchmask.tokenizers.tokenizer_json import TokenizerJson


def new_tokens(texts: Sequence[str] | str, backend: Backend, *, special: bool) -> list[AddedToken]:
    """The texts as tokens behind the vocabulary, those left out that are added or control tokens already.

    Raises:
        ConfigError: C03, not a list of texts; C13, an empty one; C09, a control token that is ordinary vocabulary, or a
            name that the vocabulary has for another text.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    held = {**backend.specials, **backend.markers}
    tokens: list[AddedToken] = []
    for text in dict.fromkeys(texts):
        if not isinstance(text, str):
            raise ConfigError("C03", f"expected texts of tokens, found {text!r}", where="add_tokens")
        if not text.strip():
            raise ConfigError("C13", f"{text!r} cannot be a token: it has nothing but blanks", where="add_tokens")
        if text in held:
            continue
        ids = backend.encode(text)
        if len(ids) == 1 and backend.id_to_piece(ids[0]) == text:
            if special:
                raise ConfigError(
                    "C09",
                    f"{text!r} is an ordinary token of the vocabulary already (id {ids[0]})",
                    where="add_tokens",
                    fix=f"choose a text that nobody types, such as '<|{text.strip('<|>')}|>'",
                )
            continue
        id = backend.piece_to_id(text)
        if id is not None:
            raise ConfigError(
                "C09",
                f"{text!r} is how the tokenizer's file spells a token that it has already (id {id}, in a text "
                f"{backend.decode([id])!r}), so no other token can have that name",
                where="add_tokens",
                fix="write the token as it stands in texts, or choose another name",
            )
        tokens.append(AddedToken(text, backend.vocab_size + len(tokens), special=special))
    return tokens


def extended(backend: Backend, tokens: Sequence[AddedToken]) -> Backend:
    """The back end with tokens behind its vocabulary."""
    if isinstance(backend, TokenizerJson):
        backend.add(tokens)
        return backend
    return WithAddedTokens(backend, tokens)


def noted_tokens(folder: Path, control: Mapping[str, int]) -> list[str]:
    """The tokens that were added to a folder's tokenizer here, by its tokenizer_config.json.

    Raises:
        ConfigError: C11, the tokenizer lacks one.
    """
    texts = read_json(folder / CONFIG_FILE).get(ADDED_KEY, [])
    missing = [str(text) for text in texts if text not in control]
    if missing:
        message = f"{ADDED_KEY} names {', '.join(missing)}, which the tokenizer does not have"
        raise ConfigError("C11", message, where=str(folder / CONFIG_FILE))
    return list(texts)


def tokens_of_template(template: TemplateFormat, sources: Iterable[str], control: Iterable[str]) -> set[str]:
    """Control tokens that a chat template spells out, or writes around a plain question and its answer."""
    chat = [Message("user", "a"), Message("assistant", "a")]
    try:
        pieces = template.pieces(chat, None, True)
    except DataError:  # it takes no such chat
        pieces = []
    spelled = {text for source in sources for text in control if text in source}
    return spelled | {piece.text for piece in pieces if piece.is_token}

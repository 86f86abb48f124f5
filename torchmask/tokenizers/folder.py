"""Which tokenizer a folder holds, and what its configuration files say about it.

Where several tokenizer files are present, the first of these is read: tokenizer.json (a fine-tuned model's added tokens
are in it, and often nowhere else), tekken.json, tokenizer.model, vocab.json with merges.txt. What `tokenizer.model`
holds is told from its first bytes (sentencepiece and Meta's tiktoken ranks share the name). Whichever it is, the tokens
that the configuration files add are part of the tokenizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError
from torchmask.tokenizers.added_tokens import (
    ADDED_FILE,
    CONFIG_FILE,
    MAP_FILE,
    AddedToken,
    NamedTokens,
    WithAddedTokens,
    missing_tokens,
    read_named_tokens,
)
from torchmask.tokenizers.backend import Backend
from torchmask.tokenizers.json_files import read_json
from torchmask.tokenizers.library_state import split_pattern, with_split_pattern
from torchmask.tokenizers.sentencepiece_model import SentencePieceModel
from torchmask.tokenizers.tekken import tekken, tekken_pattern
from torchmask.tokenizers.template_files import template_files
from torchmask.tokenizers.tiktoken_ranks import is_tiktoken_file, llama3_ranks
from torchmask.tokenizers.tokenizer_json import TokenizerJson
from torchmask.tokenizers.vocabulary_files import byte_level_bpe

TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.json + merges.txt")
CONFIG_FILES = (CONFIG_FILE, MAP_FILE, ADDED_FILE, "chat_template.json")

# Used only where neither a configuration nor the model file says which token is which.
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "[PAD]", "<|pad|>"),
}


@dataclass(frozen=True)
class Roles:
    """Which ids begin, end and pad a text.

    Attributes:
        bos, eos, pad: ids, None where there is no such token.
        stops: the ids that end generation.
        adds_bos: whether the model's own tokenizer puts BOS in front of plain text.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    stops: tuple[int, ...]
    adds_bos: bool


def open_backend(folder: Path) -> tuple[Backend, list[Path]]:
    """The back end for a folder's tokenizer, and the files it is made of.

    Raises:
        ConfigError: C11, there is no such folder, no tokenizer in it, or its file is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(
            "C11",
            "no such tokenizer folder",
            where=str(folder),
            fix="check the path; `torchmask download REPO --output-dir FOLDER` fetches a model with its tokenizer",
        )
    named = read_named_tokens(folder)
    opened = _open_json(folder, named) or _open_beside(folder, named)
    if opened is not None:
        backend, files = opened
        configuration = (folder / name for name in CONFIG_FILES if (folder / name).is_file())
        return backend, [*files, *configuration, *template_files(folder)]
    found = sorted(path.name for path in folder.iterdir())
    raise ConfigError(
        "C11",
        f"no tokenizer here: looked for {', '.join(TOKENIZER_FILES)}; the folder holds {', '.join(found) or 'nothing'}",
        where=str(folder),
        fix="copy the model's tokenizer files into the folder (torchmask download fetches them with a model)",
    )


def _open_json(folder: Path, named: NamedTokens) -> tuple[Backend, list[Path]] | None:
    """The tokenizer of the `tokenizers` library in a folder, and its files, if there is one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    _refuse_placeholder(file)
    backend = TokenizerJson.from_file(file, config=read_json(folder / CONFIG_FILE), named=named, edit=_mended(folder))
    beside = [path for path in (_tekken_file(folder), _model_file(folder)) if path is not None]
    return backend, [file, *beside]


def _open_beside(folder: Path, named: NamedTokens) -> tuple[Backend, list[Path]] | None:
    """The tokenizer in a folder without tokenizer.json, and its files, if there is one."""
    config = read_json(folder / CONFIG_FILE)
    model_file, bpe_files = _model_file(folder), [folder / "vocab.json", folder / "merges.txt"]
    tekken_file = _tekken_file(folder)
    if tekken_file is None and model_file is None:
        if not all(path.is_file() for path in bpe_files):
            return None
        for path in bpe_files:
            _refuse_placeholder(path)
        tokenizer = byte_level_bpe(*bpe_files, config=config)
        return TokenizerJson(tokenizer, where=str(bpe_files[0]), named=named), bpe_files
    file = tekken_file or model_file
    assert file is not None
    head = _refuse_placeholder(file)
    backend: Backend
    if tekken_file is not None:
        backend = tekken(file)
    elif is_tiktoken_file(head):
        backend = llama3_ranks(file)
    else:
        control = [token.text for token in (*named.tokens, *named.names.values()) if token.is_control]
        backend = SentencePieceModel(file, control=control, prefix=_prefix(config))
    tokens: list[AddedToken] = missing_tokens(named, backend)
    beside = [model_file] if model_file is not None and model_file != file else []
    return (WithAddedTokens(backend, tokens) if tokens else backend), [file, *beside]


def _prefix(config: Mapping[str, Any]) -> str:
    """Where transformers has sentencepiece put a blank in front of text."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "first" if config.get("legacy") is False else "always"


def _mended(folder: Path) -> Callable[[Any], Any] | None:
    """Mistral's tokenizer.json files of 2025 cut text otherwise than the tekken.json next to them, which is right."""
    file = _tekken_file(folder)
    if file is None:
        return None
    pattern = tekken_pattern(file)

    def mend(tokenizer: Any) -> Any:
        found = split_pattern(tokenizer)
        return tokenizer if found in (None, pattern) else with_split_pattern(tokenizer, pattern)

    return mend


def _tekken_file(folder: Path) -> Path | None:
    """`tekken.json`, or one with a date in its name, the newest."""
    alone = folder / "tekken.json"
    return alone if alone.is_file() else max(folder.glob("tekken_*.json"), default=None)


def _model_file(folder: Path) -> Path | None:
    """`tokenizer.model`, or Mistral's `tokenizer.model.v3`."""
    alone = folder / "tokenizer.model"
    return alone if alone.is_file() else max(folder.glob("tokenizer.model.v*"), default=None)


def _refuse_placeholder(path: Path) -> bytes:
    """The file's first bytes.

    Raises:
        ConfigError: C11, the file is empty, or a git-lfs pointer or a web page in place of the real one.
    """
    with path.open("rb") as file:
        head = file.read(512)
    what = "is empty" if not head.strip() else ""
    if head.startswith(b"version https://git-lfs"):
        what = "is a git-lfs pointer, not the file itself"
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        what = "is a web page, not a tokenizer"
    if what:
        raise ConfigError("C11", f"{path.name} {what}", where=str(path), fix="download the file again")
    return head


def read_roles(folder: Path, backend: Backend, *, vocab_size: int) -> Roles:
    """BOS, EOS, padding and stop ids: from the configuration files where they speak, else from the model file.

    Order: tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json, the model file, the
    usual names. A token that tokenizer_config.json sets to null does not exist.

    Args:
        folder: with the configuration files.
        backend: its tokenizer.
        vocab_size: how many ids there are, those of tokens to be added included.

    Raises:
        ConfigError: C10, an id that is none; C11, a token that the tokenizer does not have.
    """
    tokens = {**backend.markers, **backend.specials}
    named = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")

    def role(name: str, of_model_file: str | None) -> int | None:
        key = f"{name}_token"
        if key in named:
            text = named[key].get("content") if isinstance(named[key], dict) else named[key]
            return None if text is None else _id_of(text, key, tokens, backend, folder)
        for file, config in (("generation_config.json", generation), ("config.json", model)):
            ids = _ids(config.get(f"{key}_id"), f"{key}_id", folder)
            if ids and ids[0] < vocab_size:
                return ids[0]
            if ids and name == "eos":  # the others are often left at their library's default, which is of another model
                raise _outside(ids[0], folder / file, vocab_size)
        if of_model_file is not None:
            return tokens[of_model_file]
        return next((tokens[usual] for usual in _USUAL_NAMES[name] if usual in tokens), None)

    bos, eos, pad = (role(name, text) for name, text in
                     (("bos", backend.bos), ("eos", backend.eos), ("pad", backend.pad)))  # fmt: skip
    stops = (
        _ids(generation.get("eos_token_id"), "eos_token_id", folder)
        or _ids(model.get("eos_token_id"), "eos_token_id", folder)
        or [tokens[t] for t in backend.stops]
    )
    stops = [*([] if eos is None else [eos]), *stops]
    return Roles(bos, eos, pad, tuple(dict.fromkeys(stops)), _adds_bos(bos, backend, named.get("add_bos_token")))


def _adds_bos(bos: int | None, backend: Backend, said: bool | None) -> bool:
    """Whether plain text begins with BOS: a BOS token alone does not say so, GPT-2's relatives have one and add none.

    A post-processor in tokenizer.json that is about such tokens has the last word, as in transformers; then
    `add_bos_token`; else files of the `tokenizers` library add none, and sentencepiece, Llama 3's ranks and tekken do.
    """
    if bos is None:
        return False
    if isinstance(backend, TokenizerJson):
        return bool(said) if backend.leading is None else backend.leading[:1] == (bos,)
    return True if said is None else bool(said)


def _ids(value: int | list[int] | None, key: str, folder: Path) -> list[int]:
    """A configuration's id, ids or nothing, as a list; ids below 0 mean that there is none.

    Raises:
        ConfigError: C10, it is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) for id in ids):
        message = f"{key} of generation_config.json or config.json is {value!r}, expected an id or a list of ids"
        raise ConfigError("C10", message, where=str(folder))
    return [id for id in ids if id >= 0]


def _outside(id: int, path: Path, vocab_size: int) -> ConfigError:
    return ConfigError(
        "C11",
        f"eos_token_id is {id}, and the tokenizer's ids end at {vocab_size - 1}: its files lack that token",
        where=str(path),
        fix="copy the model's tokenizer.json or tokenizer_config.json into the folder, or set eos_token there",
    )


def _id_of(text: str, key: str, tokens: dict[str, int], backend: Backend, folder: Path) -> int:
    if text in tokens:
        return tokens[text]
    ids = backend.encode(text)  # an ordinary token may serve, as in GPT-2's relatives
    if len(ids) == 1 and backend.id_to_piece(ids[0]) == text:
        return ids[0]
    raise ConfigError(
        "C11",
        f"{key} is {text!r}, which the tokenizer does not have; its control tokens: {', '.join(list(tokens)[:12])}",
        where=str(folder / "tokenizer_config.json"),
    )

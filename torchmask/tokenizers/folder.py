"""Which tokenizer a folder holds, and what its configuration files say about it.

Where several tokenizer files are present, `tokenizer.json` is read: a fine-tuned model's added tokens are in it and
not in `tokenizer.model`. What `tokenizer.model` holds is told from its first bytes (sentencepiece and Meta's tiktoken
ranks share the name).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError
from torchmask.tokenizers.backend import Backend
from torchmask.tokenizers.sentencepiece_model import SentencePieceModel
from torchmask.tokenizers.tiktoken_ranks import TiktokenRanks, is_tiktoken_file
from torchmask.tokenizers.tokenizer_json import TokenizerJson

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json + merges.txt")
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

# Used only where neither a configuration nor the model file says which token is which.
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "[PAD]", "<|pad|>"),
}


@dataclass(frozen=True)
class Roles:
    """Which ids begin, end and pad a text; `stops` are the ids that end generation."""

    bos: int | None
    eos: int | None
    pad: int | None
    stops: tuple[int, ...]


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
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    bpe_files = [folder / "vocab.json", folder / "merges.txt"]
    extra = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    if json_file.is_file():
        _refuse_placeholder(json_file)
        beside = [model_file] if model_file.is_file() else []
        return TokenizerJson(json_file), [json_file, *beside, *extra]
    if model_file.is_file():
        head = _refuse_placeholder(model_file)
        backend = TiktokenRanks(model_file) if is_tiktoken_file(head) else SentencePieceModel(model_file)
        return backend, [model_file, *extra]
    if all(path.is_file() for path in bpe_files):
        return TokenizerJson(*bpe_files), [*bpe_files, *extra]
    found = sorted(path.name for path in folder.iterdir())
    raise ConfigError(
        "C11",
        f"no tokenizer here: looked for {', '.join(TOKENIZER_FILES)}; the folder holds {', '.join(found) or 'nothing'}",
        where=str(folder),
        fix="copy the model's tokenizer files into the folder (torchmask download fetches them with a model)",
    )


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file.

    Raises:
        ConfigError: C10, the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("C10", f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ConfigError("C10", f"expected a JSON object, found {type(value).__name__}", where=str(path))
    return value


def read_roles(folder: Path, backend: Backend) -> Roles:
    """BOS, EOS, padding and stop ids: from the configuration files where they speak, else from the model file.

    Order: tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json, the model file, the
    usual names. A token that tokenizer_config.json sets to null does not exist.
    """
    tokens = {**backend.markers, **backend.specials}
    named = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")

    def role(name: str, of_model_file: str | None) -> int | None:
        key = f"{name}_token"
        if key in named:
            text = named[key].get("content") if isinstance(named[key], dict) else named[key]
            return None if text is None else _id_of(text, key, tokens, backend, folder)
        for config in (generation, model):
            ids = _ids(config.get(f"{key}_id"))
            if ids:
                return ids[0]
        if of_model_file is not None:
            return tokens[of_model_file]
        return next((tokens[usual] for usual in _USUAL_NAMES[name] if usual in tokens), None)

    bos, eos, pad = (role(name, text) for name, text in
                     (("bos", backend.bos), ("eos", backend.eos), ("pad", backend.pad)))  # fmt: skip
    stops = (
        _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id")) or [tokens[t] for t in backend.stops]
    )
    stops = [*_ids(eos), *stops]
    return Roles(bos, eos, pad, tuple(dict.fromkeys(stops)))


def _ids(value: int | list[int] | None) -> list[int]:
    """A configuration's id, ids or nothing, as a list; ids below 0 mean that there is none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return [id for id in ids if id >= 0]


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

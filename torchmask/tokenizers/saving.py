"""A tokenizer's files, written into a folder.

Both ways that transformers reads added tokens are written: into tokenizer.json, where the folder has one, and as
`added_tokens_decoder` in tokenizer_config.json. Nothing of the folder that was loaded is changed.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmask.tokenizers.added_tokens import ADDED_FILE, CONFIG_FILE, MAP_FILE, AddedToken
from torchmask.tokenizers.json_files import read_json

GENERATION_FILE = "generation_config.json"
CHAT_FORMAT_KEY, ADDED_KEY = "torchmask_chat_format", "torchmask_added_tokens"


def write_tokenizer(
    folder: Path,
    source: Path,
    files: Sequence[Path],
    *,
    chat_format: str | None,
    added: Sequence[AddedToken],
    control: Mapping[str, int],
    roles: Mapping[str, int | None],
    stops: Sequence[int],
) -> None:
    """Copies a tokenizer's files into a folder, with generation_config.json, and writes what is not in them.

    Args:
        folder: made if it is not there.
        source: where the files are.
        chat_format: a native one, which tokenizer_config.json then names.
        added: tokens that the files do not hold yet.
        control: all control tokens, which tokenizers without a tokenizer.json are told of where tokens are added.
        roles: `bos_token` and the like, and their ids.
        stops: ids that end generation; where a native format is named, generation_config.json says them, as nothing
            else tells transformers with what its turns end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generation = source / GENERATION_FILE  # names the tokens that end generation
    for file in [*files, *([generation] if generation.is_file() else [])]:
        copy = folder / file.relative_to(source)  # additional chat templates are in a folder of their own
        if file.resolve() != copy.resolve():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    config: dict[str, Any] = {}
    if chat_format is not None:
        config[CHAT_FORMAT_KEY] = chat_format
        if stops:
            known = read_json(folder / GENERATION_FILE) or {f"{key}_id": id for key, id in roles.items()}
            _write(folder / GENERATION_FILE, {**known, "eos_token_id": list(stops)})
    if added:
        config |= _added_config(folder, added, control, roles)
    if config:
        _write(folder / CONFIG_FILE, {**read_json(folder / CONFIG_FILE), **config})


def _added_config(
    folder: Path, added: Sequence[AddedToken], control: Mapping[str, int], roles: Mapping[str, int | None]
) -> dict[str, Any]:
    """What tokenizer_config.json says of added tokens; tokenizer.json and added_tokens.json are brought up to it."""
    written = read_json(folder / CONFIG_FILE)
    decoder = dict(written.get("added_tokens_decoder") or {})
    noted = [*written.get(ADDED_KEY, ()), *(token.text for token in added if token.is_control)]
    config: dict[str, Any] = {ADDED_KEY: list(dict.fromkeys(noted))}
    library_file = folder / "tokenizer.json"
    if library_file.is_file():
        state = read_json(library_file)
        held = {entry["id"]: entry for entry in state.get("added_tokens", ())}
        held |= {token.id: {"id": token.id, **token.as_json()} for token in added}
        state["added_tokens"] = list(held.values())
        _write(library_file, state, indent=None)  # ten times as fast without, and nobody reads megabytes
    else:
        news = {token.text for token in added}
        for text, id in control.items():
            if text not in news:
                decoder.setdefault(str(id), AddedToken(text, id).as_json())
        named = {**read_json(folder / MAP_FILE), **written}
        texts = {id: text for text, id in control.items()}
        config |= {key: texts[id] for key, id in roles.items() if key not in named and id is not None and id in texts}
    decoder |= {str(token.id): token.as_json() for token in added}
    if (folder / ADDED_FILE).is_file():
        held = read_json(folder / ADDED_FILE)
        _write(folder / ADDED_FILE, {**held, **{token.text: token.id for token in added}})
    return {**config, "added_tokens_decoder": dict(sorted(decoder.items(), key=lambda item: int(item[0])))}


def _write(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")

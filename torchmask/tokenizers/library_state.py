"""What the `tokenizers` library's state says, and tokenizers made from an edited state.

The library has no setters for most of this, but every tokenizer goes to JSON and back.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError

_State = dict[str, Any]
_KEEPS_ALL = ("ByteLevel", "Split", "Digits", "Punctuation")  # pre-tokenizers that cut and remove nothing


def read_file(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a `tokenizer.json`.

    Raises:
        ConfigError: C11, the file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError("C11", f"cannot be read as a tokenizer: {error}", where=str(path)) from None


def _edited(tokenizer: Any, edit: Callable[[_State], None]) -> Any:
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    edit(state)
    result = Tokenizer.from_str(json.dumps(state))
    result.encode_special_tokens = tokenizer.encode_special_tokens
    return result


def _state(step: Any) -> _State:
    return {} if step is None else json.loads(step.__getstate__())


def _parts(state: _State | None, key: str) -> Iterator[_State]:
    """The steps of a normaliser, pre-tokenizer or decoder, out of their sequences."""
    if state is None:
        return
    if state.get("type") == "Sequence":
        for part in state[key]:
            yield from _parts(part, key)
    else:
        yield state


def is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are spelled in GPT-2's alphabet of one character a byte, over a text that is at most composed."""
    normalizers = {part.get("type") for part in _parts(_state(tokenizer.normalizer), "normalizers")}
    splits = list(_parts(_state(tokenizer.pre_tokenizer), "pretokenizers"))
    return (
        type(tokenizer.model).__name__ == "BPE"
        and normalizers <= {None, "NFC"}
        and any(part.get("type") == "ByteLevel" for part in splits)
        and all(part.get("type") in _KEEPS_ALL and not part.get("add_prefix_space") for part in splits)
        and all(part.get("behavior", "Isolated") != "Removed" for part in splits)
    )


def decodes_bytes(tokenizer: Any) -> bool:
    """Whether decoding reads tokens in GPT-2's alphabet, and does nothing else."""
    return [part.get("type") for part in _parts(_state(tokenizer.decoder), "decoders")] == ["ByteLevel"]


def prefixes_first_only(tokenizer: Any) -> bool:
    """Whether a blank is put in front of what begins a text, and not in front of what follows a token."""
    splits = _parts(_state(tokenizer.pre_tokenizer), "pretokenizers")
    return any(part.get("prepend_scheme") == "first" for part in splits)


def without_prefix(tokenizer: Any) -> Any:
    """The tokenizer without a blank in front of texts, and a decoder that takes none off."""

    def edit(state: _State) -> None:
        for part in _parts(state["pre_tokenizer"], "pretokenizers"):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
        for part in _parts(state["decoder"], "decoders"):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
            if part.get("type") == "Strip":
                part["start"] = 0
        if state["normalizer"] is not None:
            kept = [part for part in _parts(state["normalizer"], "normalizers") if part.get("type") != "Prepend"]
            state["normalizer"] = {"type": "Sequence", "normalizers": kept}

    return _edited(tokenizer, edit)


def with_prefix_setting(tokenizer: Any, config: Mapping[str, Any]) -> Any:
    """The tokenizer with `add_prefix_space` as tokenizer_config.json has it, where transformers heeds it.

    That is for GPT-2's pre-tokenizer alone (not one in a sequence), and for Llama's class where it is false.
    """
    wanted = config.get("add_prefix_space")
    alone = _state(tokenizer.pre_tokenizer)
    if wanted is None:
        return tokenizer
    if alone.get("type") == "ByteLevel" and alone["add_prefix_space"] != wanted:
        tokenizer.pre_tokenizer.add_prefix_space = bool(wanted)
    if not wanted and str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
        metaspace = any(
            part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never"
            for part in _parts(alone, "pretokenizers")
        )
        prepend = any(part.get("type") == "Prepend" for part in _parts(_state(tokenizer.normalizer), "normalizers"))
        return without_prefix(tokenizer) if metaspace or prepend else tokenizer
    return tokenizer


def leading_ids(tokenizer: Any) -> tuple[int, ...] | None:
    """The ids that the post-processor puts in front of a text; None where there is none that knows of such ids."""
    found: tuple[int, ...] | None = None
    for part in _parts(_state(tokenizer.post_processor), "processors"):
        if part.get("type") == "TemplateProcessing":
            front = takewhile(lambda piece: "SpecialToken" in piece, part["single"])
            texts = [piece["SpecialToken"]["id"] for piece in front]
            found = (*(id for text in texts for id in part["special_tokens"][text]["ids"]), *(found or ()))
        elif part.get("type") in ("BertProcessing", "RobertaProcessing"):
            found = (part["cls"][1], *(found or ()))
    return found


def hidden_text(id: int) -> str:
    """What an entry of a model's vocabulary is called so that no text makes it: U+10FFFF is no character."""
    return f"\U0010ffff{id}\U0010ffff"


def without_texts(tokenizer: Any, ids: Mapping[str, int]) -> Any:
    """The tokenizer with other names for some entries of its model's vocabulary, which are no added tokens then."""

    def edit(state: _State) -> None:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in ids]
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden_text(id) if t in ids else t: id for t, id in model["vocab"].items()}
        else:
            model["vocab"] = [[hidden_text(i) if t in ids else t, score] for i, (t, score) in enumerate(model["vocab"])]
        if "merges" in model:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [(a, b) for a, b in pairs if a + b not in ids and a not in ids and b not in ids]
        if model.get("unk_token") in ids:
            model["unk_token"] = hidden_text(ids[model["unk_token"]])

    return _edited(tokenizer, edit)


def unknown_id(tokenizer: Any) -> int | None:
    """The token that stands for what the vocabulary cannot spell."""
    if type(tokenizer.model).__name__ == "Unigram":
        return json.loads(tokenizer.model.__getstate__()).get("unk_id")
    text = getattr(tokenizer.model, "unk_token", None)
    return None if text is None else tokenizer.token_to_id(text)


def split_pattern(tokenizer: Any) -> str | None:
    """The regular expression of the one `Split` among the pre-tokenizers."""
    found = [part for part in _parts(_state(tokenizer.pre_tokenizer), "pretokenizers") if part.get("type") == "Split"]
    return found[0]["pattern"].get("Regex") if len(found) == 1 else None


def with_split_pattern(tokenizer: Any, pattern: str) -> Any:
    """The tokenizer with another regular expression in its `Split`."""

    def edit(state: _State) -> None:
        for part in _parts(state["pre_tokenizer"], "pretokenizers"):
            if part.get("type") == "Split":
                part["pattern"] = {"Regex": pattern}

    return _edited(tokenizer, edit)

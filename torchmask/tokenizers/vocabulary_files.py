"""`vocab.json` with `merges.txt`, whose format says neither how text is cut nor which tokens are control tokens.

Both are facts of the tokenizer's class, which tokenizer_config.json names, so those that are known are here and others
are refused: another way to cut gives other ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError
from torchmask.tokenizers.json_files import read_json

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Classes that cut text as GPT-2 does, as Qwen2 does (after NFC), and as GPT-NeoX does (GPT-2's way after NFC).
_KINDS = {
    "GPT2Tokenizer": "gpt2",
    "CodeGenTokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2",
    "GPTNeoXTokenizer": "gpt_neox",
}
_KIND_OF_MODEL = {
    "gpt2": "gpt2",
    "codegen": "gpt2",
    "gpt_neox": "gpt_neox",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
}
_USUAL_CONTROL = ("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>")
# Qwen's vocabulary has some of these as HTML that it read; its control tokens are behind it, in the configuration.
_CONTROL_OF_KIND = {"qwen2": ("<|endoftext|>",)}


def byte_level_bpe(vocab: Path, merges: Path, *, config: Mapping[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of these files.

    Args:
        config: tokenizer_config.json; where it names no class, config.json's `model_type` says whose files they are;
            where that says nothing either, they are read as GPT-2's, whose format it is.

    Raises:
        ConfigError: C11, the configuration names a class or a `model_type` that is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = _kind(vocab.parent, config)
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    prefix = bool(config.get("add_prefix_space", False))
    if kind == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if kind != "gpt2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    usual = _CONTROL_OF_KIND.get(kind, _USUAL_CONTROL)
    control = [text for text in usual if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    """How the files cut text; those of nobody in particular are GPT-2's."""
    name, model_type = config.get("tokenizer_class"), read_json(folder / "config.json").get("model_type")
    if name is not None:
        kind, what, known, file = _KINDS.get(str(name).removesuffix("Fast")), "class", list(_KINDS), "tokenizer_config"
    elif model_type is not None:
        kind, what, known, file = _KIND_OF_MODEL.get(str(model_type)), "model_type", list(_KIND_OF_MODEL), "config"
    else:
        return "gpt2"
    if kind is None:
        raise ConfigError(
            "C11",
            f"vocab.json and merges.txt belong to the {what} {name or model_type}, and how it cuts text is not known "
            f"here; known are {', '.join(known)}",
            where=str(folder / f"{file}.json"),
            fix="put the model's tokenizer.json into the folder, which says everything",
        )
    return kind

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
_KIND_OF_MODEL = {"qwen2": "qwen2", "qwen2_moe": "qwen2", "qwen3": "qwen2", "qwen3_moe": "qwen2"}
_USUAL_CONTROL = ("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>")


def byte_level_bpe(vocab: Path, merges: Path, *, config: Mapping[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of these files.

    Args:
        config: tokenizer_config.json; without it, config.json's `model_type` says whose files they are, or GPT-2's
            is taken, whose format it is.

    Raises:
        ConfigError: C11, the configuration names a class that is not known here.
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
    control = [text for text in _USUAL_CONTROL if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    name = config.get("tokenizer_class")
    if name is None:
        return _KIND_OF_MODEL.get(str(read_json(folder / "config.json").get("model_type")), "gpt2")
    kind = _KINDS.get(str(name).removesuffix("Fast"))
    if kind is None:
        raise ConfigError(
            "C11",
            f"vocab.json and merges.txt belong to the class {name}, and how it cuts text is not known here; "
            f"known are {', '.join(_KINDS)}",
            where=str(folder / "tokenizer_config.json"),
            fix="put the model's tokenizer.json into the folder, which says everything",
        )
    return kind

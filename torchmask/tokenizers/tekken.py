"""Back end for Mistral's tekken.json: tiktoken's ranks behind a block of control tokens.

The file's vocabulary is longer than what a model uses: `default_vocab_size` ids in all, of which the first
`default_num_special_tokens` are control tokens and the rest the first ranks. Control tokens without a name in the file
are `<SPECIAL_n>`. Files before version v7 name none; theirs were fixed in mistral-common.
"""

import base64
import json
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError
from torchmask.tokenizers.tiktoken_ranks import TiktokenRanks

# The control tokens of all files that do not list their own (Mistral NeMo, Pixtral, Ministral 8B), by id.
UNLISTED_CONTROL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
# The pattern of every tekken.json so far; only of a known one is it known where it cuts.
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tekken(path: Path) -> TiktokenRanks:
    """The tokenizer in a tekken.json.

    Raises:
        ConfigError: C11, the file is damaged or not of this format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = data["config"]
        num_control, vocab_size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        pattern = str(config["pattern"])
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in data["vocab"]}
        listed = _control(data.get("special_tokens"))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"not a tekken file: {error!r}") from None
    num_ranks = vocab_size - num_control
    used = {token: rank for token, rank in ranks.items() if rank < num_ranks}
    if num_ranks < 256 or set(used.values()) != set(range(num_ranks)):
        message = f"{len(used)} tokens have a rank below {num_ranks}, which the file's config asks for"
        raise _damaged(path, message)
    if any(not 0 <= id < num_control for id in listed.values()) or len(set(listed.values())) != len(listed):
        raise _damaged(path, f"special_tokens are not {num_control} or fewer tokens with ranks of their own")
    names = {id: text for text, id in listed.items()}
    control = {names.get(id, f"<SPECIAL_{id}>"): id for id in range(num_control)}
    spoken = {entry["token_str"] for entry in data.get("special_tokens") or () if not entry.get("is_control", True)}
    return TiktokenRanks(
        path.name,
        used,
        pattern=pattern,
        control=control,
        first_id=num_control,
        roles=tuple(text if text in control else None for text in ("<s>", "</s>", "<pad>")),  # type: ignore[arg-type]
        markers=[text for text in control if text in spoken],
        cuts_at_paragraphs=pattern == TEKKEN_PATTERN,
    )


def tekken_pattern(path: Path) -> str:
    """The pattern in a tekken.json."""
    return str(json.loads(path.read_text(encoding="utf-8"))["config"]["pattern"])


def _control(listed: list[dict[str, Any]] | None) -> dict[str, int]:
    if listed is None:
        return {text: id for id, text in enumerate(UNLISTED_CONTROL)}
    return {str(entry["token_str"]): int(entry["rank"]) for entry in listed}


def _damaged(path: Path, message: str) -> ConfigError:
    return ConfigError("C11", message, where=str(path), fix="download the file again")

"""Chat formats written here, with the ids that their publishers' code makes.

A format is a function from a conversation to pieces (text with an owner, control tokens by name), so what is structure,
content and end of turn is known from writing it.
"""

import difflib
from collections.abc import Collection

from torchmask.errors import ConfigError
from torchmask.tokenizers.formats import chatml, gemma, llama, mistral, phi, plain
from torchmask.tokenizers.formats.base import ASSISTANT_MARKERS, ChatFormat, Tools, bound

__all__ = ["ASSISTANT_MARKERS", "NATIVE_FORMATS", "ChatFormat", "Tools", "native_format"]

NATIVE_FORMATS = {
    chat_format.name: chat_format
    for module in (llama, chatml, mistral, gemma, phi, plain)
    for chat_format in module.FORMATS
}


def native_format(name: str, *, control: Collection[str], bos: str | None, eos: str | None, where: str) -> ChatFormat:
    """The native format of this name, for one tokenizer.

    Args:
        name: what `chat_format` says.
        control: texts of the tokenizer's control tokens.
        bos, eos: texts of its BOS and EOS; None where it has none.
        where: the tokenizer's folder, for messages.

    Raises:
        ConfigError: C06, there is no such format, or the tokenizer lacks a token that it needs.
    """
    if name not in NATIVE_FORMATS:
        near = [known for known in NATIVE_FORMATS if name and known.startswith(f"{name}_")]
        near = near or difflib.get_close_matches(name, NATIVE_FORMATS, n=1)
        raise ConfigError(
            "C06",
            f"unknown chat_format {name!r}; there are {', '.join(NATIVE_FORMATS)}",
            fix=f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else "leave chat_format out for the folder's own template",
        )
    found = bound(NATIVE_FORMATS[name], control=control, bos=bos, eos=eos)
    missing = [text or "an EOS token" for text in found.control if text not in control]
    if missing:
        raise ConfigError(
            "C06",
            f"chat_format {name!r} needs the control tokens {', '.join(missing)}, which this tokenizer lacks; "
            f"it has {', '.join(list(control)[:12])}",
            where=where,
            fix="use the format that the model was made with",
        )
    return found

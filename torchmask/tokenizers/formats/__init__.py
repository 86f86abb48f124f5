"""Chat formats written here, with the ids that their publishers' code makes.

A format is a function from a conversation to pieces (text with an owner, control tokens by name), so what is structure,
content and end of turn is known from writing it.
"""

import difflib
from collections.abc import Collection, Sequence

from torchmask.errors import ConfigError
from torchmask.tokenizers.formats import chatml, gemma, llama, mistral, phi, plain
from torchmask.tokenizers.formats.base import ASSISTANT_MARKERS, ChatFormat, Tools, bound

__all__ = [
    "ASSISTANT_MARKERS",
    "NATIVE_FORMATS",
    "ChatFormat",
    "Tools",
    "fitting_formats",
    "native_format",
    "no_chat_format",
    "unknown_format",
]

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
        raise unknown_format(name)
    found = bound(NATIVE_FORMATS[name], control=control, bos=bos, eos=eos)
    missing = [text or "an EOS token" for text in found.control if text not in control]
    if missing:
        raise ConfigError(
            "C06",
            f"chat_format {name!r} needs the control tokens {', '.join(missing)}, which this tokenizer lacks; "
            f"it has {', '.join(list(control)[:12])}",
            where=where,
            fix="use the format that the model was made with; those whose tokens this tokenizer has: "
            f"{', '.join(fitting_formats(control=control, bos=bos, eos=eos)) or 'none'}",
        )
    return found


def fitting_formats(*, control: Collection[str], bos: str | None, eos: str | None) -> list[str]:
    """The names of the native formats all of whose control tokens a tokenizer has; arguments as `native_format`'s."""
    formats = (bound(known, control=control, bos=bos, eos=eos) for known in NATIVE_FORMATS.values())
    return [known.name for known in formats if all(text in control for text in known.control)]


def no_chat_format(fitting: Sequence[str], *, where: str) -> ConfigError:
    """C06, for a tokenizer whose folder has no template: the native formats that it could use."""
    return ConfigError(
        "C06",
        "this tokenizer has no chat template, so conversations need a chat_format",
        where=where,
        fix=f"set tokenizer.chat_format; this vocabulary has the tokens of {', '.join(fitting) or 'none of them'}",
    )


def unknown_format(name: object, *, where: str | None = None) -> ConfigError:
    """C06, for a name that no native format has: what was meant, and all that there are."""
    near = [known for known in NATIVE_FORMATS if name and known.startswith(f"{name}_")]
    near = near or difflib.get_close_matches(str(name), NATIVE_FORMATS, n=1)
    return ConfigError(
        "C06",
        f"unknown chat_format {name!r}; there are {', '.join(NATIVE_FORMATS)}",
        where=where,
        fix=f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else "leave chat_format out for the folder's own template",
    )

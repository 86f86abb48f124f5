"""The chat templates in a folder, wherever it has them."""

from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError
from torchmask.tokenizers.json_files import read_json

TEMPLATE_FILE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def template_files(folder: Path) -> list[Path]:
    """The files of a folder that hold nothing but templates: chat_template.jinja and those beside it."""
    alone = folder / TEMPLATE_FILE
    return [*([alone] if alone.is_file() else []), *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]


def read_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name (`default`, `tool_use`, ...); empty where it has none.

    `chat_template.jinja` is the default one, `additional_chat_templates/NAME.jinja` are the others; without them,
    `chat_template` of tokenizer_config.json, else of chat_template.json, is the default one or all by name.

    Raises:
        ConfigError: C10, a file is not what it should be.
    """
    found = {
        "default" if path.name == TEMPLATE_FILE else path.stem: path.read_text(encoding="utf-8")
        for path in template_files(folder)
    }
    for name in () if found else ("tokenizer_config.json", "chat_template.json"):
        found = found or _named(read_json(folder / name).get("chat_template"), folder / name)
    return {name: source for name, source in found.items() if source.strip()}


def _named(value: Any, path: Path) -> dict[str, str]:
    """The templates that a configuration file has: a text, a list of names and templates, or an object of them."""
    try:
        named = {"default": value} if isinstance(value, str) else value or {}
        if isinstance(named, list):
            named = {entry["name"]: entry["template"] for entry in named}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return dict(named)
    except (AttributeError, KeyError, TypeError):
        pass
    raise ConfigError(
        "C10",
        f"chat_template is neither a template nor a list of objects with `name` and `template`: {str(value)[:60]!r}",
        where=str(path),
        fix="download the file again",
    )

"""What a configuration says of its tokenizer, checked against the chat formats there are and the tokenizer's own files.

A module of its own because `torchmask.config` knows no component by name, and `torchmask.tokenizers` no configuration.
Nothing of either is imported for a configuration that leaves both to the folder, or whose folder is not there.
"""

from collections.abc import Iterator
from pathlib import Path

from torchmask.config.document import Node
from torchmask.errors import ConfigError, TorchmaskError

TOKENIZER = "torchmask.tokenizers.from_pretrained"
CHAT_DATASET = "torchmask.data.chat_dataset"


def problems_of_formats(root: Node, is_good: bool) -> list[TorchmaskError]:
    """A problem (C06) for each `chat_format` that there is not; no file is read.

    Args:
        root: a configuration.
        is_good: not used; problems of formats are worth reporting beside any others.
    """
    problems: list[TorchmaskError] = []
    for key, node in _components(root):
        said = node.at(["chat_format"])
        if _component(node) != TOKENIZER or said is None or not said.value or "${" in str(said.value):
            continue
        from torchmask.tokenizers.formats import NATIVE_FORMATS, unknown_format

        if not isinstance(said.value, str) or said.value not in NATIVE_FORMATS:
            problems.append(unknown_format(said.value, where=f"{said.place}: {key}.chat_format"))
    return problems


def problems_of_tokenizers(root: Node, is_good: bool) -> list[TorchmaskError]:
    """The same, and what opening the tokenizer's folder tells, where nothing else is wrong and the folder is there.

    That is a damaged or missing file (C11), a format whose control tokens the vocabulary lacks (C06), data that needs a
    chat format where neither the folder nor the configuration has one (C09).

    Args:
        root: a configuration.
        is_good: whether no problem was found yet.
    """
    problems = problems_of_formats(root, is_good)
    at = root.at(["tokenizer"])
    if problems or not is_good or at is None or _component(at) != TOKENIZER:
        return problems
    arguments = {key: value for key, value in at.plain().items() if key != "_component_"}
    if not Path(str(arguments.get("folder"))).is_dir():
        return problems
    from torchmask.data.builder_options import chat_dataset_needs, chat_needs
    from torchmask.tokenizers import from_pretrained

    try:
        tokenizer = from_pretrained(**arguments)
    except TorchmaskError as error:
        return [error]
    if tokenizer.has_chat_format:
        return []
    for key, node in (("", root), *_components(root)):  # `chat` is a key of the recipe generate too
        asked = node.at(["chat"])
        if _component(node) == CHAT_DATASET:
            needed = chat_dataset_needs(tokenizer)
            where = f"{node.place}: {key}"
        elif _is_ours(key, node) and asked is not None and asked.value is True:
            needed = chat_needs(tokenizer)
            where = f"{asked.place}: {key}.chat".replace(": .", ": ")
        else:
            continue
        problems.append(ConfigError(needed.id, needed.message, where=where, fix=needed.fix))
    return problems


def _is_ours(key: str, node: Node) -> bool:
    """Whether `chat` means the chat format there: in the recipe's own keys and in our data sets."""
    return not key or _component(node).startswith("torchmask.data.")


def _components(root: Node) -> Iterator[tuple[str, Node]]:
    """Every component of a configuration, with its key."""
    return ((".".join(path), node) for path, node in root.walk() if _component(node))


def _component(node: Node) -> str:
    named = node.value.get("_component_") if isinstance(node.value, dict) else None
    return named.value if named is not None and isinstance(named.value, str) else ""

"""The documentation says what the code does: keys, defaults, commands, configurations, snippets and links exist."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from torchmask.cli.catalog import configs, find_config, find_recipe, recipes
from torchmask.cli.main import _parser
from torchmask.cli.run import parse
from torchmask.config import load_config
from torchmask.config.document import compose, core_scalar
from torchmask.config.schema import Field, read_schema
from torchmask.errors import ConfigError

REPO = Path(__file__).resolve().parent.parent
PAGES = [*sorted((REPO / "docs").glob("*.md")), REPO / "README.md", REPO / "CONTRIBUTING.md"]
RECIPE_PAGES = {name: REPO / "docs" / f"{name}.md" for name in ("finetune", "generate", "pretrain")}
MAX_LINES = 150
LONG_PAGES = ("errors.md",)  # one entry an error

# What a fragment of a configuration is put into: every recipe's required keys.
BASES = {
    "finetune": {
        "output_dir": "out",
        "model": {"_component_": "torchmask.models.from_pretrained", "folder": "model"},
        "tokenizer": {"_component_": "torchmask.tokenizers.from_pretrained", "folder": "model"},
        "dataset": {"_component_": "torchmask.data.alpaca_dataset"},
    },
    "pretrain": {
        "output_dir": "out",
        "model": {"_component_": "torchmask.models.from_pretrained", "folder": "model"},
        "tokenizer": {"_component_": "torchmask.tokenizers.from_pretrained", "folder": "model"},
        "sources": [{"dataset": {"_component_": "torchmask.data.alpaca_dataset"}}],
        "num_steps": 10,
    },
    "generate": {
        "checkpoint_dir": "model",
        "tokenizer": {"_component_": "torchmask.tokenizers.from_pretrained", "folder": "model"},
    },
}


class Block(NamedTuple):
    """A fenced or indented block of a page: its language (empty where none is said), text and first line."""

    language: str
    text: str
    line: int


def page_id(value: Any) -> str | None:
    return value.relative_to(REPO).as_posix() if isinstance(value, Path) else None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    fence: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], 1):
        is_fence = line.startswith("```")
        if is_fence and fence is None:
            fence, lines = (line[3:].strip(), number + 1), []
        elif is_fence and fence is not None:
            found.append(Block(fence[0], "\n".join(lines), fence[1]))
            fence, lines = None, []
        elif fence is not None or line.startswith("    "):
            lines.append(line if fence else line[4:])
        elif lines:
            found.append(Block("", "\n".join(lines), number - len(lines)))
            lines = []
    assert fence is None, f"{page.name}:{fence} is not closed"
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def inline_code(page: Path) -> list[str]:
    return [code.replace("\n", " ").replace("\\|", "|") for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[list[str]]:
    """The words after `torchmask` of every command in blocks and in inline code."""
    found = []
    for text in [*(block.text for block in blocks(page) if block.language in ("", "bash")), *inline_code(page)]:
        rest = re.sub(r"\\\n\s*", " ", text)
        for match in re.finditer(r"(?:^|\s)torchmask +(?=[a-z])", rest):
            command = rest[match.end() :]
            for stop in [m.start() for m in re.finditer("\n", command)] + [len(command)]:
                try:  # a quoted argument may go over several lines
                    words = shlex.split(command[:stop], comments=True)
                except ValueError:
                    continue
                found.append(words[: words.index("2>&1")] if "2>&1" in words else words)
                break
    return found


def verbs() -> list[str]:
    [action] = [action for action in _parser()._actions if action.dest == "verb"]
    assert action.choices is not None
    return list(action.choices)


def is_placeholder(word: str) -> bool:
    return word.strip("[]").split("|")[0].isupper()


def flat(fields: dict[str, Field], prefix: str = "") -> dict[str, Field]:
    """Fields by full key; a section's own in its place, those of a list's items behind it."""
    result: dict[str, Field] = {}
    for field in fields.values():
        if field.section:
            result |= flat(field.section, f"{prefix}{field.name}.")
        else:
            result[prefix + field.name] = field
        if field.items:
            result |= flat(field.items, f"{prefix}{field.name}.")
    return result


def key_table(recipe: str, page: Path) -> dict[str, str]:
    """Key of a recipe -> default, of the rows `| `key` | default | meaning |` of a page."""
    fields = read_schema(find_recipe(recipe)).fields
    rows = re.findall(r"^\| `([a-z_.0-9]+)` \| ([^|]*) \| [^|]*", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {key: default.strip() for key, default in rows if key.split(".")[0] in fields}


def schema_of(page: Path) -> Any:
    return read_schema(find_recipe(page.stem))


def default_of(config_class: type, key: str) -> Any:
    *sections, last = key.split(".")
    for part in sections:
        hint = typing.get_type_hints(config_class)[part]  # a section, a section or None, or a list of them
        config_class = next(kind for kind in (hint, *typing.get_args(hint)) if hasattr(kind, "__dataclass_fields__"))
    field = config_class.__dataclass_fields__[last]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def keys_of(recipe: str) -> dict[str, str]:
    """Every key that the pages of a recipe have, with its default; a section that recipes share has its own page."""
    table = key_table(recipe, RECIPE_PAGES[recipe])
    if table.pop("lora", None):
        table |= key_table(recipe, REPO / "docs/lora.md")
    return table


@pytest.mark.parametrize(("recipe", "page"), RECIPE_PAGES.items(), ids=page_id)
def test_the_page_of_a_recipe_has_every_key_and_no_other(recipe, page):
    documented = keys_of(recipe)
    assert set(flat(read_schema(find_recipe(recipe)).fields)) == set(documented)


@pytest.mark.parametrize("page", RECIPE_PAGES.values(), ids=page_id)
def test_documented_defaults_are_those_of_the_code(page):
    schema = schema_of(page)
    fields = flat(schema.fields)
    for key, shown in keys_of(page.stem).items():
        if shown.startswith("required"):
            assert fields[key].required, key
        elif fields[key].default is None:  # components are described in words
            default = default_of(schema.config_class, key)
            expected = "" if shown == '""' else [] if shown == "[]" else core_scalar(shown.strip("`"))
            assert default == expected and type(default) is type(expected), key


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_are_short(page):
    assert page.name in LONG_PAGES or len(page.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_page_has_a_path_of_somebodys_machine(page):
    text = re.sub(r"^```text.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"/(home|root|work|Users)/", text)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_name_verbs_recipes_and_configurations_that_exist(page):
    names = {entry.name for entry in [*recipes(), *configs()]}
    for words in commands(page):
        verb, rest = words[0], words[1:]
        assert verb in verbs(), words
        if verb in ("cp", "cat") and rest and not is_placeholder(rest[0]):
            assert rest[0] in names, words
        if verb == "run" and "--config" in rest:
            check_run(rest)
        if verb == "validate" and "--config" in rest and not is_placeholder(rest[rest.index("--config") + 1]):
            check_config_name(rest[rest.index("--config") + 1])


def check_run(words: list[str]) -> None:
    """A `torchmask run` line: its recipe, its configuration and the keys of its overrides."""
    if any(is_placeholder(word) for word in words if not word.startswith("-") and "=" not in word and ":" not in word):
        return
    request = parse(words)
    own_copy = request.recipe.endswith(".py")
    if not own_copy:
        find_recipe(request.recipe)
    check_config_name(request.config)
    fields = read_schema(find_recipe("finetune" if own_copy else request.recipe)).fields
    for override in request.overrides:
        key = override.lstrip("~").partition("=")[0].split(".")[0]
        assert key in fields or key == "...", f"{override!r} in {words}"


def check_config_name(name: str) -> None:
    if not name.endswith((".yaml", ".yml")):
        find_config(name)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_of_configurations_exist(page):
    folders = {entry.name.split("/")[0] for entry in configs() if "/" in entry.name}
    known = {entry.name for entry in configs()}
    for code in inline_code(page):
        if re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", code) and code.split("/")[0] in folders:
            assert code in known, code


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_dotted_names_of_torchmask_exist(page):
    text = re.sub(r"^```text.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = text.replace("torchmask.data has nothing named", "").replace("torchmask.env:", "").replace(
        "torchmask.configs:", ""
    )  # fmt: skip
    for dotted in set(re.findall(r"\btorchmask(?:\.\w+)+", text)):
        parts = dotted.split(".")
        if parts[-1] in ("env", "configs", "git", "yaml", "svg", "html"):
            continue
        assert resolves(parts), dotted


def resolves(parts: list[str]) -> bool:
    found: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_yaml_snippets_load_or_are_fragments_that_do(page, tmp_path):
    for block in blocks(page):
        if block.language != "yaml":
            continue
        first = re.match(r"# (\w+):", block.text)
        recipe = first[1] if first and first[1] in BASES else "finetune"
        given = compose(block.text, source=page.name).plain()
        config = tmp_path / f"line{block.line}.yaml"
        config.write_text(
            block.text + "\n" + "".join(f"{k}: {v}\n" for k, v in BASES[recipe].items() if k not in given)
        )
        try:
            load_config(config, recipe=find_recipe(recipe))
        except ConfigError as error:
            raise AssertionError(f"{page.name}:{block.line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_snippets_are_python_and_import_what_exists(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torchmask"):
                for alias in node.names:
                    assert resolves([*node.module.split("."), alias.name]), f"{page.name}:{block.line}: {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documented_error_ids_are_those_of_the_code():
    """`tests/test_architecture.py` checks the other direction."""
    sources = [*(REPO / "torchmask").rglob("*.py"), *(REPO / "recipes").glob("*.py")]
    used = {id for path in sources for id in re.findall(r'"([CDWKR]\d\d)"', path.read_text(encoding="utf-8"))}
    text = (REPO / "docs" / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### ([A-Z]\d\d)$", text, flags=re.MULTILINE)) <= used


def test_the_table_of_families_has_every_type_and_the_number_of_its_cases():
    from torchmask.models import FAMILIES

    rows = re.findall(r"^\| (`[a-z0-9_`, ]+`) \|.*\| (\d+) \|$", (REPO / "docs/families.md").read_text(), re.MULTILINE)
    cases = [json.loads(path.read_text())["model_type"] for path in (REPO / "tests/models/configs").glob("*.json")]
    listed = {}
    for names, count in rows:
        types = re.findall(r"`([a-z0-9_]+)`", names)
        listed[tuple(types)] = int(count)
    assert {name for types in listed for name in types} == set(FAMILIES)
    assert listed == {types: sum(cases.count(name) for name in types) for types in listed}

"""The rules of the design that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "torchmask"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((REPO / "recipes").glob("*.py"))
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
FOREIGN_TRAINERS = {"transformers", "accelerate", "peft", "trl", "lightning", "deepspeed"}
TORCHLESS = ("cli", "config", "tokenizers", "messages.py", "errors.py", "constants.py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def test_layers_hold():
    """The contracts of pyproject.toml (import-linter)."""
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.parametrize(
    "package", ["torchmask.cli.main", "torchmask.config", "torchmask.tokenizers", "torchmask.messages"]
)
def test_importing_it_imports_no_torch(package):
    code = f"import sys, {package}; assert not {{'torch', 'torchao'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.relative_to(PACKAGE).parts[0] in TORCHLESS], ids=name)
def test_only_the_launcher_and_the_verbs_that_run_something_import_torch(path):
    """Inside a function too, but for the launcher, whose work it is."""
    torch_modules = {module for module in imports(path) if module.split(".")[0] in ("torch", "torchao")}
    assert not torch_modules or path == PACKAGE / "cli" / "launch.py"


@pytest.mark.parametrize("path", SOURCES + RECIPES, ids=name)
def test_no_trainer_of_somebody_else_no_unsafe_loading_nothing_unfinished(path):
    text = path.read_text()
    assert not FOREIGN_TRAINERS & {module.split(".")[0] for module in imports(path)}
    for word in (
        "weights_only=False",
        "trust_remote_code",
        "NotImplementedError",
        "import pickle",
        "TODO",
        "FIXME",
        "XXX",
    ):
        assert word not in text, word
    assert not re.search(r"\btorch\.load\(", text) or "weights_only=True" in text


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_named_after_what_they_hold(path):
    assert path.stem not in ("utils", "util", "helpers", "common", "misc", "manager", "handler")
    assert not path.stem.endswith("_v2")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py" and p.parent != PACKAGE], ids=name)
def test_names_that_a_package_exports_late_are_listed_for_those_who_read_the_source(path):
    """`torchmask.config.signatures` and type checkers find them in the `if TYPE_CHECKING:` block."""
    tree = ast.parse(path.read_text())
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return
    listed = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    [exported] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(exported) <= listed | defined


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_are_short_plain_and_alone(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(tree)
    assert not {module for module in imports(path) if module.split(".")[0] == "recipes"}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "main" in functions
    assert not re.search(r"is_distributed|world_size\s*[>=]=?\s*1|is_initialized", text), "shard() and friends do that"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_field_of_a_recipes_config_has_a_comment(path):
    from torchmask.config.schema import read_schema

    def without_meaning(fields, prefix=""):
        for field in fields.values():
            if not field.meaning:
                yield prefix + field.name
            if field.section:
                yield from without_meaning(field.section, prefix + field.name + ".")
            if field.items:
                yield from without_meaning(field.items, prefix + field.name + ".")

    schema = read_schema(path)
    assert list(without_meaning(schema.fields)) == []
    assert schema.config_class.__dataclass_params__.frozen


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipes_config_is_read_without_torch(path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom torchmask.config.schema import read_schema\n"
        f"read_schema(Path({str(path)!r}))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_configurations_are_short_and_say_their_recipe_and_purpose(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 50
    assert re.match(rf"# ({'|'.join(p.stem for p in RECIPES)}): \S", lines[0]), lines[0]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_configurations_pass_their_own_check(path):
    from torchmask.cli.catalog import find_recipe, recipe_of
    from torchmask.config import load_config

    load_config(path, recipe=find_recipe(recipe_of(path)))


def test_every_error_id_is_documented():
    documented = set(re.findall(r"^### ([A-Z]\d\d)$", (REPO / "docs" / "errors.md").read_text(), flags=re.MULTILINE))
    used = {id for path in SOURCES + RECIPES for id in re.findall(r'"([CDWKR]\d\d)"', path.read_text())}
    assert used - documented == set()

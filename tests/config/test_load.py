"""A configuration, overrides and a recipe's Config become one checked object, or one report of everything wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from torchmask.config import Trust, instantiate, load_config, load_recipe, trust_for_this_process
from torchmask.config.schema import read_schema
from torchmask.errors import ConfigError, ConfigProblems

RECIPE = '''\
"""A little recipe."""
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torchmask.config import Component, component
from torchmask.errors import ConfigError, ConfigProblems

SMALL = 8


class Mode(Enum):
    fast = "fast"
    slow = "slow"


@dataclass(frozen=True, kw_only=True)
class Packing:
    max_seq_len: int = 512  # slots of a row
    strategy: str = "best_fit"  # how rows are filled


@dataclass(frozen=True, kw_only=True)
class Config:
    output_dir: str  # where everything is written
    model: Component  # the model to train
    optimizer: Component = component("params")  # takes the steps
    dataset: Component | None = component("tokenizer", default=None)
    lr_scheduler: Component | None = component("optimizer", "num_steps=", default=None)
    packing: Packing = field(default_factory=Packing)  # rows
    extra: Packing | None = None
    batch_size: int = SMALL  # rows of a micro-batch
    lr: float = 1e-3
    name: str = "x"
    note: str | None = None
    names: list[str] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16"] = "float32"
    mode: Mode = Mode.fast
    shuffle: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1:
            problems.append(ConfigError("C13", f"{self.batch_size} is too small", where="batch_size", fix="1 or more"))
        if self.packing.max_seq_len < 2:
            problems.append(ConfigError("C13", "too short", where="packing.max_seq_len"))
        if problems:
            raise ConfigProblems(problems)


def show(x: torch.Tensor) -> torch.Tensor:
    return x


def main(cfg: Config) -> None:
    print(cfg)
'''

GOOD = """\
output_dir: ./out
model:
  _component_: torch.nn.Linear
  in_features: 3
  out_features: 4
  bias: yes
optimizer:
  _component_: torch.optim.AdamW
  lr: 2e-5
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def load(tmp_path, recipe):
    def load_text(text, *overrides, **options):
        (tmp_path / "my.yaml").write_text(text)
        return load_config(tmp_path / "my.yaml", recipe=recipe, overrides=overrides, **options)

    return load_text


@pytest.fixture
def problems(load, tmp_path):
    def problems_of(text, *overrides, **options):
        with pytest.raises(ConfigProblems) as raised:
            load(text, *overrides, **options)
        found = raised.value.problems
        return [(p.id, (p.where or "").replace(str(tmp_path) + "/", ""), p.message, p.fix or "") for p in found]

    return problems_of


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a refused component was run"


def test_the_result_is_an_instance_of_the_recipes_frozen_config(load):
    config = load(GOOD, "packing.max_seq_len=128", "mode=slow", "names=[a, 'b']").instance
    assert dataclasses.is_dataclass(config) and type(config).__name__ == "Config"
    assert config.packing.max_seq_len == 128 and type(config.packing).__name__ == "Packing"
    assert config.mode.value == "slow"
    assert type(config.model) is dict and config.model["bias"] is True
    assert type(config.names) is list and config.names == ["a", "b"]
    assert config.optimizer == {"_component_": "torch.optim.AdamW", "lr": 2e-5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1


def test_the_real_recipe_gets_its_own_class(load, recipe):
    checked = load(GOOD, "name=a\\${b}")
    module = load_recipe(recipe)
    config = checked.as_config(module.Config)
    assert type(config) is module.Config
    assert config.name == "a${b}"


@pytest.mark.parametrize("text", ["0123", "on", "1e3", "1.0", "true", "2026-01-01", "null"])
def test_text_fields_keep_their_text(load, text):
    assert load(GOOD + f"name: {text}\n").instance.name == text
    assert load(GOOD, f"name={text}").instance.name == text


def test_text_arguments_of_components_keep_their_text(load):
    assert load(GOOD.replace("bias: yes", "device: 0123")).values["model"]["device"] == "0123"
    text = GOOD + "dataset:\n  _component_: torch.nn.CrossEntropyLoss\n  reduction: 1e3\n"
    assert load(text).values["dataset"]["reduction"] == "1e3"


@pytest.mark.parametrize("text", ["2e-5", "1e-4", "3", '"2e-5"', "1."])
def test_float_fields_are_floats(load, text):
    value = load(GOOD + f"lr: {text}\n").instance.lr
    assert type(value) is float and value == float(text.strip('"'))


@pytest.mark.parametrize(("text", "value"), [("on", True), ("no", False), ("true", True)])
def test_boolean_fields_take_the_words_of_old_yaml(load, text, value):
    assert load(GOOD + f"shuffle: {text}\n").instance.shuffle is value


def test_optional_text_is_null_or_text(load):
    assert load(GOOD + "note: null\n").instance.note is None
    assert load(GOOD + "note: 0123\n").instance.note == "0123"


def test_references_are_resolved(load):
    config = load(GOOD + "batch_size: 4\nname: ${output_dir}/x\nextra: {max_seq_len: '${batch_size}'}\n").instance
    assert config.name == "./out/x" and config.extra.max_seq_len == 4


def test_here_is_the_folder_of_the_configuration(load, tmp_path):
    assert load(GOOD + "name: ${here:data/a.json}\n").instance.name == str(tmp_path / "data/a.json")


def test_everything_wrong_is_reported_at_once_in_reading_order(problems):
    found = problems(
        """\
model:
  _component_: torch.nn.Linear
  in_features: three
  outfeatures: 3
optimizer:
  _component_: torch.optim.AdmW
  lrr: 2e-5
dataset:
  path: x
packing: {max_sq_len: 128, max_seq_len: 1.5}
bach_size: 4
batch_size: four
lr: ${nope}
dtype: float8
mode: slowly
""",
        "justakey",
        "optimizer.weight=1",
        "packing.strat=1",
    )
    assert [(id, where) for id, where, _, _ in found] == [
        ("C05", "my.yaml"),
        ("C08", "my.yaml:2: model"),
        ("C03", "my.yaml:3: model.in_features"),
        ("C08", "my.yaml:4: model.outfeatures"),
        ("C06", "my.yaml:6"),
        ("C05", "my.yaml:8"),
        ("C01", "my.yaml:10"),
        ("C03", "my.yaml:10"),
        ("C01", "my.yaml:11"),
        ("C03", "my.yaml:12"),
        ("C03", "my.yaml:13"),
        ("C03", "my.yaml:14"),
        ("C03", "my.yaml:15"),
        ("C04", "command line"),
        ("C01", "command line"),
    ]
    text = "\n".join(f"{message} | {fix}" for _, _, message, fix in found)
    assert "'output_dir' is required: where everything is written" in text
    assert "torch.nn.Linear needs 'out_features'" in text
    assert "torch.nn.Linear wants int for 'in_features', got 'three'" in text
    assert "takes no argument 'outfeatures' | did you mean 'out_features'? accepted are in_features" in text
    assert "torch.optim has nothing named 'AdmW' | did you mean torch.optim.AdamW" in text
    assert "'dataset' has no `_component_`" in text
    assert "unknown key 'packing.max_sq_len' | did you mean 'packing.max_seq_len'?" in text
    assert "'packing.max_seq_len' (slots of a row) wants int, got '1.5'" in text
    assert "unknown key 'bach_size' | did you mean 'batch_size'?" in text
    assert "'batch_size' (rows of a micro-batch) wants int, got 'four'" in text
    assert "'lr': Interpolation key 'nope' not found" in text
    assert "is 'float8' | choose one of float32, bfloat16" in text
    assert "'justakey' is not an override" in text
    assert "unknown key 'packing.strat' | did you mean 'packing.strategy'?" in text


def test_two_missing_keys_are_named_with_their_meaning(problems):
    found = problems("name: x\n")
    assert [(id, message) for id, _, message, _ in found] == [
        ("C05", "'output_dir' is required: where everything is written"),
        ("C05", "'model' is required: the model to train"),
        ("C05", "'optimizer' is required: takes the steps"),
    ]
    assert "model._component_=..." in found[1][3]


def test_the_checks_of_the_config_itself_get_a_place(problems):
    assert problems(GOOD + "batch_size: 0\n", "packing.max_seq_len=1") == [
        ("C13", "my.yaml:10: batch_size", "0 is too small", "1 or more"),
        ("C13", "command line: packing.max_seq_len", "too short", ""),
    ]


def test_arguments_of_components_are_checked_on_the_command_line_too(problems):
    [(id, where, message, fix)] = problems(GOOD, "optimizer.lrr=1")
    assert (id, where) == ("C08", "command line: optimizer.lrr")
    assert "takes no argument 'lrr'" in message and "did you mean 'lr'?" in fix
    assert "params" not in fix, "the recipe passes params, nobody should set it"


def test_arguments_that_the_recipe_passes_are_not_missing_and_not_settable(load, problems):
    load(GOOD, "optimizer=torch.optim.SGD")
    [(id, _, message, _)] = problems(GOOD, "optimizer.params=1")
    assert id == "C08" and "the recipe passes 'params'" in message
    [(id, _, message, _)] = problems(GOOD, "lr_scheduler=torch.optim.lr_scheduler.StepLR", "lr_scheduler.step_size=1")
    assert id == "C08" and "the recipe passes num_steps" in message


def test_nested_components_are_checked(problems):
    text = GOOD.replace("  bias: yes", "  device:\n    - {_component_: torch.nn.Linear, in_feature: 1}")
    found = problems(text)
    assert ("C08", "my.yaml:7: model.device.0.in_feature") in [(id, where) for id, where, _, _ in found]


@pytest.mark.parametrize(
    "dotpath",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.serialization.load",
        "torch.utils.cpp_extension.load",
        "torch.utils.cpp_extension.load_inline",
        "torch.nn.modules.module.functools.partial",
        "torch.optim.optimizer.functools.partial",
        "torch.optim.optimizer.deepcopy",
        "torch.nn.functional.importlib.import_module",
        "torchmask.cli.main.main",
        "torchmask.data.os.system",
        "torch.nn.Linear.__init__.__globals__",
    ],
)
def test_what_is_not_a_building_block_is_refused_and_not_run(problems, canary, dotpath):
    found = problems(GOOD + f"dataset:\n  _component_: {dotpath}\n  command: touch {canary}\n")
    assert found[0][0] in ("C07", "C06") and found[0][1] == "my.yaml:11"
    with pytest.raises(ConfigError) as raised:
        instantiate({"_component_": dotpath, "command": f"touch {canary}"})
    assert raised.value.id in ("C07", "C06")


def test_a_foreign_module_is_not_imported_by_a_check_and_trust_allows_it(tmp_path, problems, load, monkeypatch):
    package = tmp_path / "elsewhere" / "stranger"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\ndef rows(tokenizer, n=1): return n\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    text = GOOD + "dataset: {_component_: stranger.rows, n: 2}\n"
    [(id, where, _, fix)] = problems(text)
    assert (id, where) == ("C07", "my.yaml:10") and "add `--trust stranger`" in fix
    assert load(text, trust=Trust(modules=("stranger",))).values["dataset"]["n"] == 2
    assert not (tmp_path / "imported").exists(), "a check imports nothing that can be read"
    [(id, _, _, _)] = problems(text.replace("n: 2", "m: 2"), trust=Trust(modules=("stranger",)))
    assert id == "C08"


def test_python_files_beside_the_configuration_may_be_named(tmp_path, load, problems):
    (tmp_path / "my_rows.py").write_text(
        "import os\nfrom os import system\ndef rows(tokenizer, *, n: int = 1):\n    return [tokenizer] * n\n"
    )
    trust = Trust(folders=(str(tmp_path),))
    text = GOOD + "dataset: {_component_: my_rows.rows, n: 2}\n"
    checked = load(text, trust=trust)
    trust_for_this_process(trust)
    try:
        assert instantiate(checked.values["dataset"], "tok") == ["tok", "tok"]
        with pytest.raises(ConfigError, match="is refused"):
            instantiate({"_component_": "my_rows.system"}, "true")
        with pytest.raises(ConfigError, match="is refused"):
            instantiate({"_component_": "my_rows.os.system"}, "true")
    finally:
        trust_for_this_process(Trust())
    [(id, _, message, _)] = problems(text.replace("n: 2", "n: two"), trust=trust)
    assert id == "C03" and "wants int for 'n'" in message
    assert problems(text)[0][0] == "C07"


def test_a_file_named_like_a_module_of_python_does_not_open_that_module(tmp_path, canary):
    (tmp_path / "os.py").write_text("def system(command): ...\n")
    trust_for_this_process(Trust(folders=(str(tmp_path),)))
    try:
        with pytest.raises(ConfigError, match="is refused"):
            instantiate({"_component_": "os.system", "command": f"touch {canary}"})
    finally:
        trust_for_this_process(Trust())


def test_a_name_that_comes_through_a_reference_is_checked_too(problems):
    found = problems(GOOD + "name: os.system\ndataset: {_component_: '${name}', command: x}\n")
    assert found[0][0] == "C07"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${oc.env:HF_TOKEN}", "the resolver 'oc.env' is refused"),
        ("${oc.${name}:HF_TOKEN}", "is refused"),
        ("${torchmask.env:HF_TOKEN}", "may not be read"),
        ("${torchmask.env:WANDB_API_KEY,x}", "may not be read"),
        ("${oc.select:model}", "is refused"),
        ("\\\\${oc.env:HF_TOKEN}", "is refused"),
        ("${oc.env:${name}}", "is refused"),
        ("${ oc.env : HF_TOKEN }", "is refused"),
        ("x${name}${oc.env:HF_TOKEN}y", "is refused"),
    ],
)
def test_secrets_cannot_be_read_from_the_environment(problems, monkeypatch, value, message):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = problems(GOOD + f"note: '{value}'\n")
    assert found[0][0] == "C14" and found[0][1] == "my.yaml:10: note"
    assert not any("hf_secret" in part for problem in found for part in problem)
    assert message in found[0][2]


def test_a_few_variables_can_be_read(load, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.delenv("SCRATCH", raising=False)
    config = load(GOOD + "name: run-${torchmask.env:SLURM_JOB_ID}\nnote: ${torchmask.env:SCRATCH,/tmp}/x\n").instance
    assert config.name == "run-42" and config.note == "/tmp/x"


def test_validate_finds_files_that_do_not_exist(load, problems, tmp_path):
    (tmp_path / "a.json").write_text("[]")
    text = GOOD + (
        "dataset:\n  _component_: torch.nn.Identity\n  source: {path}\n  folder: ./nowhere\n"
        "  glob: {folder}/*.jsonl\n  hub: tatsu-lab/alpaca\n  prompt: 'Write out.json now'\nnote: ./out/later.json\n"
    ).replace("{path}", str(tmp_path / "a.json")).replace("{folder}", str(tmp_path))
    load(text)
    found = problems(text, check_files=True)
    assert [(id, where) for id, where, _, _ in found] == [
        ("C15", "my.yaml:13: dataset.folder"),
        ("C15", "my.yaml:14: dataset.glob"),
    ]
    assert str(Path("nowhere").absolute()) in found[0][2] and "no file matches" in found[1][2]


def test_checking_imports_no_torch_whether_good_or_bad(tmp_path, recipe):
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD + "bach_size: 3\ndataset: {_component_: torch.os.system}\n")
    code = f"""
import sys
from pathlib import Path
from torchmask.config import load_config
from torchmask.errors import ConfigProblems
recipe = Path({str(recipe)!r})
assert load_config(recipe.parent / "good.yaml", recipe=recipe).instance.batch_size == 8
try:
    load_config(recipe.parent / "bad.yaml", recipe=recipe, overrides=["optimizer.lrr=1", "optimizer=torch.optim.SDG"])
except ConfigProblems as error:
    assert len(error.problems) == 3, error
else:
    raise AssertionError
assert not {{"torch", "numpy"}} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_that_needs_the_recipes_imports_is_read_by_importing_it(tmp_path):
    path = tmp_path / "heavy.py"
    path.write_text(
        "from dataclasses import dataclass\nimport torch\n\nclass Mine: ...\n\n"
        "@dataclass(frozen=True)\nclass Config:\n    size: int = torch.iinfo(torch.int8).max  # how big\n\n"
        "def main(cfg): ...\n"
    )
    schema = read_schema(path)
    assert schema.config_class().size == 127
    assert schema.fields["size"].meaning == "how big"


def test_a_recipe_without_a_config_says_what_is_needed(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("def main(cfg): ...\n")
    with pytest.raises(ConfigError, match="needs a frozen dataclass `Config`"):
        read_schema(path)


def test_a_default_component_is_changed_by_arguments_and_replaced_by_a_component(tmp_path):
    path = tmp_path / "default.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom torchmask.config import Component, component\n"
        "@dataclass(frozen=True)\nclass Config:\n    optimizer: Component = component(\n"
        "        'params', default={'_component_': 'torch.optim.AdamW', 'lr': 1e-3, 'fused': True})\n"
    )
    (tmp_path / "my.yaml").write_text("# nothing\n")

    def optimizer(*overrides):
        return load_config(tmp_path / "my.yaml", recipe=path, overrides=overrides).instance.optimizer

    assert optimizer() == {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}
    assert optimizer("optimizer.lr=1") == {"_component_": "torch.optim.AdamW", "lr": 1, "fused": True}
    assert optimizer("optimizer=torch.optim.SGD", "optimizer.momentum=0.9") == {
        "_component_": "torch.optim.SGD",
        "momentum": 0.9,
    }
    (tmp_path / "my.yaml").write_text("optimizer: {_component_: torch.optim.Adagrad}\n")
    assert optimizer() == {"_component_": "torch.optim.Adagrad"}


def test_comments_above_and_beside_a_field_are_its_meaning(tmp_path):
    path = tmp_path / "commented.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n"
        "    # where it goes,\n    # in two lines\n    a: int\n    b: int = 1  # beside\n    c: int = 2\n"
    )
    fields = read_schema(path).fields
    assert [field.meaning for field in fields.values()] == ["where it goes, in two lines", "beside", ""]
    assert [field.required for field in fields.values()] == [True, False, False]

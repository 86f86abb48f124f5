"""A key whose value is a list of sections: every item is checked as a section of its own."""

import pytest

from torchmask.config import instantiate, load_config, load_recipe, prepare
from torchmask.config.schema import read_schema
from torchmask.errors import ConfigError, ConfigProblems

RECIPE = '''\
"""A little recipe."""
from dataclasses import dataclass

import torch
from torchmask.config import Component, component


@dataclass(frozen=True)
class Part:
    layer: Component = component("in_features")  # what is stacked
    weight: float = 1.0  # how much of it


@dataclass(frozen=True)
class Config:
    parts: list[Part]  # the stack
    size: int = 3  # features


def main(cfg: Config) -> None:
    print(cfg)
'''
GOOD = """\
size: 4
parts:
  - {layer: {_component_: torch.nn.Linear, out_features: "${size}", bias: yes}, weight: 2}
  - layer: {_component_: torch.nn.Linear, out_features: 5}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        (tmp_path / "stack.py").write_text(RECIPE)
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml", recipe=tmp_path / "stack.py", overrides=overrides)

    return load_text


def problems(load, text, *overrides):
    with pytest.raises(ConfigProblems) as caught:
        load(text, *overrides)
    return {(problem.id, problem.where.rpartition("/")[2]) for problem in caught.value.problems}, str(caught.value)


def test_items_become_instances_with_defaults_references_and_overrides(load, tmp_path):
    checked = load(GOOD, "parts.1.weight=0.5", "parts.0.layer.bias=false")
    parts = checked.as_config(load_recipe(tmp_path / "stack.py").Config).parts
    assert [part.weight for part in parts] == [2.0, 0.5]
    assert parts[0].layer == {"_component_": "torch.nn.Linear", "out_features": 4, "bias": False}
    assert instantiate(parts[1].layer, 3).weight.shape == (5, 3)


def test_the_fields_of_items_are_in_the_schema(load, tmp_path):
    load(GOOD)
    field = read_schema(tmp_path / "stack.py").fields["parts"]
    assert field.items["layer"].given == ("in_features",) and field.items["weight"].meaning == "how much of it"


def test_everything_wrong_in_the_items_is_found_with_its_place(load):
    text = GOOD + "  - {weigth: 1, weight: much}\n  - layer: {_component_: torch.nn.Linear, out_featurs: 1}\n"
    found, shown = problems(load, text)
    assert found == {
        ("C01", "c.yaml:5"),
        ("C03", "c.yaml:5"),
        ("C05", "c.yaml:5"),
        ("C08", "c.yaml:6: parts.3.layer"),
        ("C08", "c.yaml:6: parts.3.layer.out_featurs"),
    }
    assert "did you mean 'parts.2.weight'" in shown and "'parts.2.layer' is required: what is stacked" in shown


@pytest.mark.parametrize("value", ["7", "[7]", "{layer: 1}", "word"])
def test_what_is_no_list_of_mappings_is_refused(load, value):
    _, shown = problems(load, f"parts: {value}\n")
    assert "'parts' (the stack) wants a list of layer, weight" in shown


def test_a_prepared_call_is_checked_and_made_later():
    call = prepare({"_component_": "torch.nn.Linear", "out_features": 2}, 3, bias=False)
    assert call().weight.shape == (2, 3) and call.keywords == {"out_features": 2, "bias": False}
    with pytest.raises(ConfigError, match="accepted are"):
        prepare({"_component_": "torch.nn.Linear", "outs": 2}, 3)

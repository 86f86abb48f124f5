"""Overrides as typed on a command line."""

import pytest

from torchmask.config.document import as_node, compose
from torchmask.config.overrides import apply_overrides, parse_value

BASE = """\
optimizer:
  _component_: torch.optim.AdamW
  lr: 2e-5
  fused: true
packing: null
layers: [1, 2, {x: 3}]
name: x
"""


def override(*words: str):
    root = compose(BASE, source="my.yaml")
    problems = apply_overrides(root, words)
    assert not problems, problems
    return root.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("null", None),
        ("true", True),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("a=b=c", "a=b=c"),
        ("Question: why?", "Question: why?"),
        ("it is # no comment", "it is # no comment"),
        ("'0123'", "0123"),
        ("", None),
    ],
)
def test_values_are_scalars_lists_dicts_or_text(text, value):
    assert parse_value(text).plain() == value


def test_a_value_with_equals_signs_is_kept():
    assert override("name=a=b")["name"] == "a=b"


def test_nested_keys_are_set_also_below_null_and_in_lists():
    plain = override("packing.max_seq_len=8", "layers.0=7", "layers.2.x=9", "optimizer.lr=1")
    assert plain["packing"] == {"max_seq_len": 8}
    assert plain["layers"] == [7, 2, {"x": 9}]
    assert plain["optimizer"]["lr"] == 1


def test_a_tilde_removes_a_key():
    plain = override("~optimizer.fused", "~name")
    assert plain["optimizer"] == {"_component_": "torch.optim.AdamW", "lr": 2e-5}
    assert "name" not in plain


@pytest.mark.parametrize(
    "words", [("optimizer=torch.optim.SGD", "optimizer.lr=1"), ("optimizer.lr=1", "optimizer=torch.optim.SGD")]
)
def test_a_new_component_drops_the_arguments_of_the_old_one_in_any_order(words):
    assert override(*words)["optimizer"] == {"_component_": "torch.optim.SGD", "lr": 1}


def test_a_component_can_be_set_to_null():
    assert override("optimizer=null")["optimizer"] is None


@pytest.mark.parametrize(
    ("word", "message", "fix"),
    [
        ("justakey", "'justakey' is not an override", "write key=value"),
        ("=3", "'=3' is not an override", "write key=value"),
        ("a..b=3", "'a..b=3' is not an override", "write key=value"),
        ("~optimizer.fussed", "removes a key that is not there", "did you mean '~optimizer.fused'?"),
        ("layers.7=1", "the list has 3 items", None),
        ("name=[1", "not valid YAML", None),
        ("name=!!python/object:os.system {}", "is refused", None),
    ],
)
def test_what_cannot_be_applied_is_said(word, message, fix):
    problems = apply_overrides(compose(BASE, source="my.yaml"), [word, "name=ok"])
    assert len(problems) == 1
    assert message in problems[0].message
    assert problems[0].where == "command line"
    assert fix is None or fix in problems[0].fix


@pytest.mark.parametrize("text", ["[hello", "{a}", "!tag x", '"hi" he said', '"quoted"', "0123", "a=b: c"])
def test_text_is_kept_as_it_was_typed(text):
    root = as_node({"prompt": "old", "size": 1}, "x.yaml:1")
    assert apply_overrides(root, [f"prompt={text}", "size=2"], text_keys=["prompt"]) == []
    assert root.plain() == {"prompt": text, "size": 2}


def test_null_still_empties_a_text():
    root = as_node({"prompt": "old"}, "x.yaml:1")
    assert apply_overrides(root, ["prompt=null"], text_keys=["prompt"]) == []
    assert root.plain() == {"prompt": None}

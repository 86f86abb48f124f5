"""YAML with places, and text that stays text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.config.document import Node, compose, core_scalar, read_yaml
from torchmask.errors import ConfigError


def read(text: str) -> Node:
    return compose(text, source="my.yaml")


def test_every_key_knows_its_line():
    root = read("# note\na: 1\nb:\n  c: x\n  d:\n  - 1\n  - e: 2\n")
    places = {".".join(path): node.place for path, node in root.walk()}
    assert places["a"] == "my.yaml:2"
    assert places["b.c"] == "my.yaml:4"
    assert places["b.d.1.e"] == "my.yaml:7"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0123", "0123"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        (".inf", math.inf),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    assert core_scalar(text) == value and type(core_scalar(text)) is type(value)


@pytest.mark.parametrize("text", ["0123", "on", "1e3", "true", "2026-01-01", "~"])
def test_the_text_of_a_scalar_is_kept(text):
    assert read(f"key: {text}").value["key"].text == text
    assert read(f'key: "{text}"').value["key"].value == text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_no_text_makes_a_scalar_fail(text):
    core_scalar(text)


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "my.yaml:3:2", "flow sequence"),
        ("a:\n\tb: 1\n", "my.yaml:2:1", "a tab where YAML wants spaces"),
        ("a: 1\nb: 2\na: 3\n", "my.yaml:3:1", "duplicate key 'a', first written at my.yaml:1"),
        ("a: 'open\n", "my.yaml:2:1", "quoted scalar"),
        ("? [x]\n: 1\n", "my.yaml:1:3", "a key has to be one word"),
    ],
)
def test_syntax_errors_have_line_and_column(text, where, words):
    with pytest.raises(ConfigError) as raised:
        read(text)
    assert raised.value.id == "C10"
    assert raised.value.where == where
    assert words in raised.value.message


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!mine", "!!binary", "!!set"]
)
def test_tags_that_build_objects_are_refused(tag):
    with pytest.raises(ConfigError, match="is refused") as raised:
        read(f"a: 1\nb: {tag} x\n")
    assert raised.value.id == "C14"
    assert raised.value.where == "my.yaml:2:4"


def test_aliases_and_merge_keys_work_and_bombs_do_not():
    merged = read("base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  y: 3\n").plain()
    assert merged["mine"] == {"x": 1, "y": 3}
    with pytest.raises(ConfigError, match="alias"):
        read("a: &a [*a]\n")
    bomb = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
    )
    with pytest.raises(ConfigError, match="100000"):
        read(bomb)


def test_a_file_with_a_byte_order_mark_and_an_empty_file_are_read(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "bom.yaml").plain() == {"a": 1}
    assert read_yaml(tmp_path / "empty.yaml").plain() == {}
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data.json_places import find_values, parse_path
from torchmask.errors import ConfigError


def found(text, path):
    return [text[start:end] for start, end, _ in find_values(text, parse_path(path))]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("$.answer", ['"Par\\"is"']),
        ("$.a.b[1].c", ["null"]),
        ("$.a.b[-1]['d e']", ["-1.5e3"]),
        ("$.a.b[*]", ["1", '{"c": null, "d e": -1.5e3}']),
        ("$.a.*", []),
        ("$.none", []),
        ("$.answer.x", []),
        ("$.a.b[7]", []),
    ],
)
def test_values_are_found_by_path(path, values):
    text = ' {"answer": "Par\\"is", "a": {"b": [1, {"c": null, "d e": -1.5e3}]}} '
    assert found(text, path) == values


def test_the_same_text_elsewhere_is_not_found():
    text = '{"question": "answer", "x": {"answer": "no"}, "answer": "yes"}'
    [(start, _, is_text)] = find_values(text, ("answer",))
    assert text[:start].endswith('}, "answer": ') and is_text


def test_of_a_key_that_is_written_twice_the_last_counts():
    assert found('{"a": 1, "a": 2}', "$.a") == ["2"]


def test_json_inside_other_text_is_found():
    assert found('So {not json} and ```json\n{"a": [1]}\n``` and {"a": 2}', "$.a") == ["[1]", "2"]


@pytest.mark.parametrize("text", ["", "plain", '{"a": 1', '{"a" 1}', "{a: 1}", '["a" "b"]', '{"a": tru}', "[" * 5000])
def test_what_is_no_json_has_no_values(text):
    assert found(text, "$.a") == []


@pytest.mark.parametrize("path", ["answer", "$answer", "$.", "$[x]", "$..a", "$.a[]"])
def test_paths_of_another_kind_are_refused(path):
    with pytest.raises(ConfigError, match="json_path"):
        parse_path(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=12,
)


def walk(value, steps=()):
    yield steps, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from walk(item, (*steps, key))


@given(value=values, indent=st.sampled_from([None, 2]), ascii=st.booleans())
def test_every_value_is_where_the_standard_decoder_reads_it(value, indent, ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    for steps, expected in walk(value):
        [(start, end, is_text)] = find_values(text, steps)
        assert json.loads(text[start:end]) == expected and is_text == isinstance(expected, str)

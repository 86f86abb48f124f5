import pytest

from torchmask.data.spans import SpanRule, name_rules
from torchmask.errors import ConfigError
from torchmask.messages import Message


def selected(text, **rule):
    return [text[start:end] for start, end in SpanRule(train=True, **rule).find(text)]


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("a1 b22", {"regex": r"\d+"}, ["1", "22"]),
        ("a=1, b=2", {"regex": r"a=(?P<value>\d)"}, ["1"]),
        ("a=1 b=2", {"regex": r"(?P<k>\w)=(?P<v>\d)", "group": "v"}, ["1", "2"]),
        ("a=1 b=2", {"regex": r"(\w)=1"}, ["a=1"]),
        ("aaa", {"regex": "x*"}, []),
        ('{"a": "x"}', {"json_path": "$.a"}, ["x"]),
        ('{"a": "x"}', {"json_path": "$.a", "quotes": True}, ['"x"']),
        ('{"a": ""}', {"json_path": "$.a"}, []),
        ('{"a": 3}', {"json_path": "$.a"}, ["3"]),
        ("x[a]y[b]", {"between": ["[", "]"]}, ["a", "b"]),
        ("x[a]y[b]", {"between": ["[", "]"], "inclusive": True}, ["[a]", "[b]"]),
        ("x[a", {"between": ["[", "]"]}, []),
        ("The answer is: 7", {"between": ["is:", None]}, [" 7"]),
        ("a\n```json\n{}\n```\n```py\n1\n```", {"fence": "json"}, ["{}\n"]),
        ("a\n```json\n{}\n```\n```py\n1\n```", {"fence": "any"}, ["{}\n", "1\n"]),
        ("```json\n{}\n```", {"fence": "json", "inclusive": True}, ["```json\n{}\n```"]),
        ("```json\r\n{}\r\n```\r\n", {"fence": "json"}, ["{}\r\n"]),
        ("1. x\n   ```json\n   {}\n   ```\n", {"fence": "json"}, ["   {}\n"]),
        ("  ```json\n{}\n  ```", {"fence": "json", "inclusive": True}, ["```json\n{}\n  ```"]),
        ("```JSON\n{}\n```", {"fence": "json"}, ["{}\n"]),
        ("``` json title=a\n{}\n```", {"fence": "json"}, ["{}\n"]),
        ("```json5\n{}\n```", {"fence": "json"}, []),
        ("```c++\nx\n```", {"fence": "C++"}, ["x\n"]),
        ("~~~json\n{}\n~~~", {"fence": "json"}, ["{}\n"]),
        ("````md\n```json\n{}\n```\n````", {"fence": "md"}, ["```json\n{}\n```\n"]),
        ("```\na\n```\n```py\nb\n```", {"fence": "any"}, ["a\n", "b\n"]),
        ("```json\n```", {"fence": "json"}, []),
        ("<think>a\nb</think>c", {"tag": "think"}, ["<think>a\nb</think>"]),
        ("<think>a</think>c", {"tag": "think", "inclusive": False}, ["a"]),
        ("<thinking>a</thinking>", {"tag": "think"}, []),
    ],
)
def test_what_a_rule_selects(text, rule, expected):
    assert selected(text, **rule) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"chars": [0, 2]}, [(0, 2)]),
        ({"chars": [-2, None]}, [(4, 6)]),
        ({"chars": [9, 12]}, []),
        ({"part": 1}, [(2, 4)]),
        ({"part": -1}, [(4, 6)]),
        ({"part": 3}, []),
        ({"part": "plan"}, [(0, 2), (4, 6)]),
    ],
)
def test_characters_and_parts_of_the_messages_own_text(rule, expected):
    parts = [{"text": "ab", "name": "plan"}, {"text": "cd"}, {"text": "ef", "name": "plan"}]
    assert SpanRule(train=True, **rule).find_own(Message("assistant", parts)) == expected


def test_rules_look_at_the_assistant_unless_they_only_hide_or_name_roles():
    assert [SpanRule(regex="a", train=True).looks_at(role) for role in ("user", "assistant")] == [False, True]
    assert SpanRule(regex="a", visible=False).looks_at("user")
    assert SpanRule(regex="a", weight=0.5, roles=("user",)).looks_at("user")


def test_rules_without_names_get_names_that_differ():
    rules = [SpanRule(tag="a", train=True), SpanRule(tag="b", train=True), SpanRule(tag="c", name="x", train=True)]
    assert [named.name for named in name_rules(rules, ())] == ["tag", "tag#2", "x"]
    with pytest.raises(ConfigError, match="'eos'"):
        name_rules([SpanRule(tag="a", name="eos", train=True)], ("eos",))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"train": True}, "selects nothing"),
        ({"regex": "a", "tag": "b", "train": True}, "regex and tag"),
        ({"regex": "a"}, "says nothing"),
        ({"regex": "(", "train": True}, "no pattern"),
        ({"regex": "a", "group": "b", "train": True}, "no group 'b'"),
        ({"json_path": "answer", "train": True}, r"begin with \$"),
        ({"between": ["a"], "train": True}, r"between: \[start, end\]"),
        ({"regex": "a", "train": False, "weight": 0.5}, "train=false and weight=0.5"),
        ({"regex": "a", "train": "all"}, "true, false or only"),
        ({"regex": "a", "weight": float("nan")}, "finite"),
        ({"regex": "a", "weight": True}, "a number"),
        ({"regex": "a", "train": True, "roles": ["asistant"]}, "did you mean 'assistant'"),
        ({"regx": "a", "train": True}, "did you mean 'regex'"),
        ({"regex": "a", "visible": "no"}, "visible='no'"),
        ({"regex": "a", "visible": 0}, "visible=0"),
        ({"regex": "a", "train": 1}, "train=1"),
        ({"regex": "a", "train": "yes"}, "true, false or only"),
        ({"regex": "a", "weight": "0.5"}, "weight='0.5'"),
        ({"regex": "a", "weight": 1e40}, "weight=1e"),
        ({"regex": "a", "weight": 1e-40}, "weight=1e-40"),
        ({"regex": 5, "train": True}, "regex=5"),
        ({"regex": "", "train": True}, "not empty"),
        ({"json_path": ["$.a"], "train": True}, "json_path="),
        ({"tag": "", "train": True}, "tag=''"),
        ({"fence": "", "train": True}, "fence=''"),
        ({"fence": True, "train": True}, "fence=True"),
        ({"regex": "a", "name": 5, "train": True}, "name=5"),
        ({"regex": "a", "roles": 5, "train": True}, "roles=5"),
        ({"regex": "a", "roles": [], "train": True}, "not empty"),
        ({"regex": "a", "roles": [5], "train": True}, "5"),
        ({"part": True, "train": True}, "part=True"),
        ({"part": "", "train": True}, "part=''"),
        ({"part": 1.0, "train": True}, "part=1.0"),
        ({"chars": ["a", "b"], "train": True}, "whole numbers"),
        ({"chars": [0, True], "train": True}, "whole numbers"),
        ({"chars": 5, "train": True}, "chars=5"),
        ({"chars": [5, 2], "train": True}, "selects nothing"),
        ({"chars": [-2, -5], "train": True}, "selects nothing"),
        ({"chars": [3, 0], "train": True}, "selects nothing"),
        ({"between": ["a", 3], "train": True}, "end marker 3"),
        ({"between": ["a", ""], "train": True}, "end marker ''"),
        ({"between": [None, "a"], "train": True}, "start marker"),
        ({"between": 5, "train": True}, "between=5"),
        ({"regex": "a", "quotes": "yes", "train": True}, "quotes='yes'"),
        ({"regex": "a", "quotes": True, "train": True}, "quotes belongs to json_path"),
        ({"regex": "a", "inclusive": True, "train": True}, "inclusive belongs to between and fence and tag"),
        ({"part": 1, "inclusive": False, "train": True}, "inclusive=false, which means nothing for part"),
        ({"tag": "a", "group": "x", "train": True}, "group belongs to regex"),
        ({"regex": "a", "train": True, "weight": 0}, "train=true and weight=0"),
        ({"regex": "a", "train": "only", "weight": 0}, "train=only and weight=0"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rule, text):
    with pytest.raises(ConfigError, match=text) as raised:
        SpanRule.of(rule)
    assert raised.value.fix


def test_a_rule_of_a_named_part_is_called_after_it():
    rules = [SpanRule(part="reasoning", weight=0.1), SpanRule(part="plan", train=True), SpanRule(part=0, train=True)]
    assert [named.name for named in name_rules(rules, ("part",))] == ["reasoning", "plan", "part#2"]

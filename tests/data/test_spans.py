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
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rule, text):
    with pytest.raises(ConfigError, match=text):
        SpanRule.of(rule)

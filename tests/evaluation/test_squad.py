import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.errors import DataError
from torchmask.evaluation import (
    Parsed,
    evaluate_squad,
    format_before_after,
    format_evaluation,
    json_answer,
    normalize_answer,
    parse_answer,
    squad_scores,
)

KEYS = ["exact", "f1", "total"]


def test_the_table_has_the_official_keys_in_the_official_order():
    table = squad_scores({"a": ["x"], "b": []}, {"a": "x", "b": ""})
    assert list(table) == KEYS + [f"HasAns_{k}" for k in KEYS] + [f"NoAns_{k}" for k in KEYS]
    assert table == {k: (100.0 if "total" not in k else (1 if "_" in k else 2)) for k in table}


def test_keys_of_a_kind_of_question_that_is_not_there_are_left_out():
    assert list(squad_scores({"a": ["x"]}, {"a": "x"})) == KEYS + [f"HasAns_{k}" for k in KEYS]
    assert list(squad_scores({"a": []}, {"a": ""})) == KEYS + [f"NoAns_{k}" for k in KEYS]


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (["The Eiffel Tower"], "eiffel tower!", 1, 1.0),
        (["U.S."], "us", 1, 1.0),
        (["a, an; the"], "", 1, 1.0),  # nothing is left of the gold: as if there were none
        (["Denver Broncos", "Broncos"], "the broncos", 1, 1.0),
        (["Denver Broncos"], "Broncos", 0, 2 / 3),
        (["x x y"], "x x z", 0, 2 / 3),
        (["Paris"], "", 0, 0.0),
        ([], "Paris", 0, 0.0),
        ([], "  The ", 1, 1.0),
        (["theatre"], "atre", 0, 0.0),  # articles are whole words
        (["1–2"], "12", 0, 0.0),  # a dash outside ASCII stays
    ],
)
def test_answers_compare_as_in_the_official_script(gold, prediction, exact, f1):
    table = squad_scores({"q": gold}, {"q": prediction})
    assert table["exact"] == 100.0 * exact
    assert table["f1"] == pytest.approx(100.0 * f1)


def test_a_missing_prediction_scores_nothing_even_where_abstaining_is_right():
    table = squad_scores({"a": ["x"], "b": []}, {})
    assert table["total"] == 2 and table["exact"] == 0.0 and table["NoAns_exact"] == 0.0


def test_predictions_for_other_questions_are_ignored():
    assert squad_scores({"a": ["x"]}, {"a": "x", "z": "y"})["total"] == 1


def test_no_questions_is_an_error():
    with pytest.raises(DataError, match="no questions"):
        squad_scores({}, {})


def test_scores_on_the_real_dev_set_equal_those_of_the_official_script(assets):
    data = json.loads((assets / "data/squad_v2_cs224n_dev.json").read_text())["data"]
    questions = [
        (paragraph["context"], qa) for article in data for paragraph in article["paragraphs"] for qa in paragraph["qas"]
    ]
    gold = {qa["id"]: [answer["text"] for answer in qa["answers"]] for _, qa in questions}
    predictions = {}
    for i, (context, qa) in enumerate(questions):
        last = (gold[qa["id"]] or [context])[-1]
        some_words = " ".join(last.split()[1:4])
        predictions[qa["id"]] = "" if i % 3 == 0 else last if i % 3 == 1 and gold[qa["id"]] else some_words
    # evaluate-v2.0.py on the same file and these predictions; it agrees on 20 sets of random ones as well.
    assert squad_scores(gold, predictions) == {
        "exact": 34.89634748272458,
        "f1": 40.95120126925696,
        "total": 6078,
        "HasAns_exact": 37.01030927835052,
        "HasAns_f1": 49.65683893970577,
        "HasAns_total": 2910,
        "NoAns_exact": 32.95454545454545,
        "NoAns_f1": 32.95454545454545,
        "NoAns_total": 3168,
    }


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalize_answer(text)
    assert normalize_answer(once).split() == [w for w in once.split() if w not in ("a", "an", "the")]


# answers as JSON


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"answer": "Lyon"}', Parsed("Lyon")),
        ('Sure: {"answer": " Lyon "}{"answer": "Paris"}', Parsed("Lyon")),
        ('{"answer": "a \\"b\\" {c}", "why": [1]}', Parsed('a "b" {c}')),
        ('{"answer": "?"}', Parsed("")),
        ('{"answer": null}', Parsed("")),
        ('{"answer": 1990}', Parsed("1990")),
        (' {"answer": "Ly', Parsed('{"answer": "Ly', malformed=True)),
        ('{"reply": "Lyon"}', Parsed('{"reply": "Lyon"}', malformed=True)),
        ('{"answer": ["Lyon"]}', Parsed('{"answer": ["Lyon"]}', malformed=True)),
        ('{"answer": true}', Parsed('{"answer": true}', malformed=True)),
        ("?", Parsed("?", malformed=True)),
        ("", Parsed("", malformed=True)),
        ("[" * 100 + '{"answer": ' * 3_000, Parsed(("[" * 100 + '{"answer": ' * 3_000).strip(), malformed=True)),
    ],
)
def test_the_answer_is_read_from_the_first_object(text, expected):
    assert parse_answer(text) == expected
    assert json_answer(text) == expected.answer


@given(st.text().filter(lambda text: text.strip() not in ("", "?")))
def test_any_text_written_as_json_is_read_back(text):
    assert parse_answer("x" + json.dumps({"answer": text})) == Parsed(text.strip())


@given(st.text())
def test_no_text_makes_the_parser_fail(text):
    assert isinstance(json_answer(text), str)


# evaluation of a model


QUESTIONS = [
    {"id": "1", "context": "c", "question": "Where?", "answers": {"text": ["Lyon"], "answer_start": [0]}},
    {"id": "2", "context": "c", "question": "When?", "answers": ["1990", "in 1990"]},
    {"id": "3", "context": "c", "question": "Which?", "answers": ["red"]},
    {"id": "4", "context": "c", "question": "Who?", "answers": []},
]


def test_every_question_is_asked_once_and_scored():
    asked = []

    def generate(rows):
        asked.extend(row["id"] for row in rows)
        return ['{"answer": "Lyon"}', '{"answer": "1991"}', "mumble", '{"answer": "?"}']

    result = evaluate_squad(QUESTIONS, generate)
    assert asked == ["1", "2", "3", "4"]
    assert result.exact_match == 50.0 and result.scores["NoAns_exact"] == 100.0
    assert (result.num_malformed, result.num_abstained) == (1, 1)
    assert [answered.exact for answered in result.answered] == [True, False, False, True]


def test_questions_are_asked_in_batches_and_in_order():
    asked = []

    def generate(rows):
        asked.append([row["id"] for row in rows])
        return ['{"answer": "red"}'] * len(rows)

    evaluate_squad(QUESTIONS, generate, batch_size=3)
    assert [len(batch) for batch in asked] == [3, len(QUESTIONS) - 3]
    assert [id for batch in asked for id in batch] == [question["id"] for question in QUESTIONS]


def test_writing_nothing_is_no_abstention():
    result = evaluate_squad(QUESTIONS, lambda rows: [""] * len(rows))
    assert result.exact_match == 0.0 and result.num_malformed == 4 and result.num_abstained == 0


def test_plain_text_answers_can_be_scored():
    result = evaluate_squad(QUESTIONS[:1], lambda rows: [" lyon\n"], parse=lambda text: Parsed(text.strip()))
    assert result.exact_match == 100.0 and result.num_malformed == 0


def test_a_row_without_a_field_is_named_with_those_it_has():
    with pytest.raises(DataError, match=r"question 1: no answers; found id, question"):
        evaluate_squad([{"id": "1", "question": "?"}], lambda rows: [""])


def test_an_id_that_is_there_twice_is_refused():
    with pytest.raises(DataError, match="'1' is there twice"):
        evaluate_squad([QUESTIONS[0], QUESTIONS[0]], lambda rows: ["", ""])


def test_the_report_before_and_after_shows_an_unanswerable_question_too():
    before = evaluate_squad(QUESTIONS, lambda rows: ["once\x1b[31m upon " * 20] * 4)
    right = ['{"answer": "Lyon"}', '{"answer": "1990"}', '{"answer": "red"}', '{"answer": "?"}']
    after = evaluate_squad(QUESTIONS, lambda rows: right)
    lines = format_before_after(before, after).splitlines()
    assert lines[0].startswith("before: exact match 0.0 %") and lines[0].endswith("4 questions  4 not as JSON")
    assert lines[1].startswith("after:  exact match 100.0 %")
    assert [line.split("(right: ")[1] for line in lines if "(right" in line] == ["Lyon)", "1990 | in 1990)", "?)"]
    assert sum("wrong" in line for line in lines) == 3 and sum("right  {" in line for line in lines) == 3
    assert "\x1b" not in "\n".join(lines) and max(map(len, lines)) < 120


def test_the_report_of_one_evaluation_shows_as_many_samples_as_asked():
    result = evaluate_squad(QUESTIONS, lambda rows: ['{"answer": "red"}'] * 4)
    text = format_evaluation("held out", result, num_samples=2)
    assert text.startswith("held out: exact match 25.0 %") and text.count("Q: ") == 2

import json

import pytest

from torchmask.data.builders import squad_dataset
from torchmask.data.rows import RowError
from torchmask.data.squad import SQUAD_PROMPT, squad_conversation, squad_rows
from torchmask.errors import ConfigError, DataError

NESTED = {
    "version": "v2.0",
    "data": [
        {"title": "A", "paragraphs": [
            {"context": "Ann has a dog.", "qas": [
                {"id": "q1", "question": "Who has a dog?",
                 "answers": [{"text": "Ann", "answer_start": 0}, {"text": "An"}],
                 "is_impossible": False},
                {"id": "q2", "question": "Who has a cat?", "answers": [], "is_impossible": True}]}]},
        {"title": "B", "paragraphs": [
            {"context": "Bo is 7.", "qas": [{"id": "q3", "question": "How old is Bo?", "answers": [{"text": "7"}]}]}]},
    ],
}  # fmt: skip
FLAT = [
    {"id": "q1", "context": "Ann has a dog.", "question": "Who has a dog?", "answers": {"text": ["Ann", "An"]}},
    {
        "id": "q2",
        "context": "Ann has a dog.",
        "question": "Who has a cat?",
        "answers": {"text": [], "answer_start": []},
    },
    {"id": "q3", "context": "Bo is 7.", "question": "How old is Bo?", "answers": ["7"]},
]


def without_place(rows):
    return [{key: value for key, value in row.items() if key != "where"} for row in rows]


@pytest.fixture
def nested(write):
    return write("squad.json", json.dumps(NESTED))


def test_nested_and_flat_files_hold_the_same_questions(write, nested):
    expected = [
        {"id": "q1", "context": "Ann has a dog.", "question": "Who has a dog?", "answers": ["Ann", "An"]},
        {"id": "q2", "context": "Ann has a dog.", "question": "Who has a cat?", "answers": []},
        {"id": "q3", "context": "Bo is 7.", "question": "How old is Bo?", "answers": ["7"]},
    ]
    assert without_place(squad_rows(nested)) == expected
    assert without_place(squad_rows(write("flat.jsonl", FLAT))) == expected
    assert without_place(squad_rows(write("articles.jsonl", NESTED["data"]))) == expected


def test_questions_are_numbered_over_the_whole_file(nested):
    assert [row["where"] for row in squad_rows(nested)] == [f"{nested}:{i}" for i in (1, 2, 3)]


def test_a_slice_counts_questions(nested):
    assert [row["id"] for row in squad_rows(nested, split="train[1:]")] == ["q2", "q3"]
    assert [row["id"] for row in squad_rows(nested, max_rows=1)] == ["q1"]


def test_the_answer_is_json_with_the_first_gold_answer_or_a_question_mark(nested):
    answers = [squad_conversation(row).messages[-1].text for row in squad_rows(nested)]
    assert answers == ['{"answer": "Ann"}', '{"answer": "?"}', '{"answer": "7"}']
    assert [json.loads(answer)["answer"] for answer in answers] == ["Ann", "?", "7"]


def test_letters_outside_ascii_stay_letters_in_the_json():
    row = {"id": "1", "context": "c", "question": "q", "answers": ['Zoë "Z"'], "where": "x:1"}
    assert squad_conversation(row).messages[-1].text == '{"answer": "Zoë \\"Z\\""}'


def test_the_default_prompt_shows_the_passage_before_the_question(nested):
    (message,) = squad_conversation(squad_rows(nested)[0], with_answer=False).messages
    assert message.role == "user" and '{"answer": "?"}' in message.text
    assert message.text.index("Ann has a dog.") < message.text.index("Who has a dog?")
    assert message.text == SQUAD_PROMPT.replace("{context}", "Ann has a dog.").replace("{question}", "Who has a dog?")


def test_only_the_json_answer_is_trained(char_tokenizer, nested):
    tokenizer = char_tokenizer()
    samples = squad_dataset(tokenizer, source=nested, prompt_template="{context} {question}", no_answer="none")
    texts = [tokenizer.text(sample.tokens[sample.trained]) for sample in samples]
    assert texts == ['{"answer": "Ann"}|', '{"answer": "none"}|', '{"answer": "7"}|']
    assert [samples.where(i) for i in range(3)] == [row["where"] for row in squad_rows(nested)]


def test_without_a_chat_format_the_answer_follows_the_prompt(char_tokenizer, nested):
    tokenizer = char_tokenizer(chat=False)
    sample = squad_dataset(tokenizer, source=nested, prompt_template="{context} {question} ")[0]
    assert tokenizer.text(sample.tokens) == '^Ann has a dog. Who has a dog? {"answer": "Ann"}$'
    assert tokenizer.text(sample.tokens[sample.trained]) == '{"answer": "Ann"}$'


def test_a_template_without_the_context_is_refused(char_tokenizer, nested):
    with pytest.raises(ConfigError, match="does not contain"):
        squad_dataset(char_tokenizer(), source=nested, prompt_template="{question}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["data"][0].pop("paragraphs"), "data[0].paragraphs is null, expected a list"),
        (lambda d: d["data"][0]["paragraphs"][0].update(qas=3), "data[0].paragraphs[0].qas is the number 3"),
        (lambda d: d["data"].append("x"), "data[2] is the text 'x', expected an object"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=None), "answers is null, expected a list"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("question"), "missing column 'question'"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].update(answers=[{"text": 4}]), "answers[0] is the number 4"),
    ],
)
def test_a_damaged_part_is_one_bad_row_with_its_path(write, change, message):
    document = json.loads(json.dumps(NESTED))
    change(document)
    path = write("bad.json", json.dumps(document))
    with pytest.raises(RowError) as caught:
        squad_rows(path)
    assert message in str(caught.value) and caught.value.where.startswith(path)
    assert squad_rows(path, on_bad_row="skip")


def test_a_file_without_questions_is_an_error(write):
    with pytest.raises(DataError, match="zero rows"):
        squad_rows(write("none.json", '{"version": "v2.0", "data": []}'))


def test_the_real_development_set_is_read_whole(assets):
    rows = squad_rows(str(assets / "data/squad_v2_cs224n_dev.json"))
    assert len(rows) == 6078 and sum(not row["answers"] for row in rows) == 3168
    assert len({row["id"] for row in rows}) == 6078 and len({row["context"] for row in rows}) <= 646

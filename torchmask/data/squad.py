"""SQuAD v2 rows -> questions, prompts and JSON answers.

The original nested JSON (`data[].paragraphs[].qas[]`), articles as rows, and flat rows as on the Hub (`id, context,
question, answers: {text: [...]}`) all become one question a row, in the file's order, numbered from 1, so that a
training sample and a question of the evaluation can be matched by file and row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

from torchmask.data.choices import check_max_rows
from torchmask.data.formats import Conversation, columns, fill, text_at
from torchmask.data.rows import BadRows, OnBadRow, Row, RowError, show_value
from torchmask.data.sources import DataFiles, open_source
from torchmask.messages import Message

SQUAD_PROMPT = (
    "Answer the question from the passage. Reply with JSON, "
    '{"answer": "words of the passage"}, or {"answer": "?"} if the passage does not say.\n\n'
    "Passage: {context}\n\nQuestion: {question}\n\nAnswer:"
)
"""The default prompt. The passage comes before the question, so that questions of one passage share a prefix."""

NO_ANSWER = "?"


class SquadRow(TypedDict):
    """One question: `answers` is empty where the passage does not say; `where` is its `file:row`."""

    id: str
    context: str
    question: str
    answers: list[str]
    where: str


def squad_rows(
    source: str,
    *,
    data_files: DataFiles | None = None,
    split: str | None = "train",
    name: str | None = None,
    on_bad_row: OnBadRow = "error",
    max_rows: int | None = None,
) -> list[SquadRow]:
    """All questions of a source with their gold answers, for evaluation; arguments as in `squad_dataset`.

    Raises:
        DataError: as `open_source`; a row that is no question (D04, D08).
        ConfigError: C13, `max_rows` is below 0.
    """
    check_max_rows(max_rows)
    bad, found, num_rows = BadRows(on_bad_row), [], 0
    for row in open_source(source, data_files=data_files, split=split, name=name, expand=expand_squad):
        if max_rows is not None and num_rows == max_rows:
            break
        num_rows += 1
        try:
            found.append(read_question(row))
        except RowError as error:
            bad.add(error)
    bad.finish(num_rows)
    return found


def squad_conversation(
    question: SquadRow,
    *,
    prompt_template: str | None = None,
    no_answer: str = NO_ANSWER,
    with_answer: bool = True,
) -> Conversation:
    """The user's prompt and, unless it is to be generated, the answer as JSON: the first gold one, or `no_answer`.

    >>> row = SquadRow(id="1", context="Paris is in France.", question="Where is Paris?", answers=[], where="x:1")
    >>> [m.text for m in squad_conversation(row, prompt_template="{context} {question}").messages]
    ['Paris is in France. Where is Paris?', '{"answer": "?"}']
    """
    texts = {"context": question["context"], "question": question["question"]}
    messages = [Message("user", fill(prompt_template or SQUAD_PROMPT, texts))]
    if with_answer:
        answer = question["answers"][0] if question["answers"] else no_answer
        messages.append(Message("assistant", json.dumps({"answer": answer}, ensure_ascii=False)))
    return Conversation(messages)


def squad_format(
    row: Row,
    *,
    column_map: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    no_answer: str = NO_ANSWER,
) -> Conversation:
    """The conversation of a flat row, see `read_question` and `squad_conversation`."""
    question = read_question(row, column_map)
    return squad_conversation(question, prompt_template=prompt_template, no_answer=no_answer)


def expand_squad(rows: Iterable[Row]) -> Iterator[Row]:
    """One row a question, from files, articles or questions; numbered from 1 in each file unless they were flat."""
    counts: dict[str, int] = {}
    for row in rows:
        values = row.values
        if row.error is not None or not ("data" in values or "paragraphs" in values):
            yield row
            continue
        articles = values.get("data", [values])
        path = "data" if "data" in values else ""
        for question in _questions(articles, path, row):
            counts[row.source] = counts.get(row.source, 0) + 1
            yield Row(row.source, counts[row.source], question.values, question.error)


def _questions(articles: Any, path: str, row: Row) -> Iterator[Row]:
    """Rows of the nested form; a part that is not as it should be becomes one bad row."""
    for a, article in enumerate(_items(articles, path, row)):
        if isinstance(article, RowError):
            yield Row(row.source, row.number, {}, article)
            continue
        here = f"{path}[{a}].paragraphs" if path else "paragraphs"
        for p, paragraph in enumerate(_items(_get(article, "paragraphs"), here, row)):
            if isinstance(paragraph, RowError):
                yield Row(row.source, row.number, {}, paragraph)
                continue
            for question in _items(_get(paragraph, "qas"), f"{here}[{p}].qas", row):
                if isinstance(question, RowError):
                    yield Row(row.source, row.number, {}, question)
                else:
                    yield Row(row.source, row.number, {"context": _get(paragraph, "context"), **question})


def _get(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _items(value: Any, path: str, row: Row) -> Iterator[Any]:
    """The objects of a list, with an error in place of everything that is not one."""
    if not isinstance(value, list):
        yield RowError("D08", "wrong_type", f"{path} is {show_value(value)}, expected a list", where=row.where)
        return
    for i, item in enumerate(value):
        if isinstance(item, Mapping):
            yield item
        else:
            message = f"{path}[{i}] is {show_value(item)}, expected an object"
            yield RowError("D08", "wrong_type", message, where=row.where)


def read_question(row: Row, column_map: Mapping[str, str] | None = None) -> SquadRow:
    """The question in a flat row.

    Raises:
        RowError: the row's own error; a missing column (D04) or a wrong type (D08).
    """
    if row.error is not None:
        raise row.error
    context, question = columns(row, ("context", "question"), column_map)
    column = (column_map or {}).get("answers", "answers")
    found = row.values.get(column)
    impossible = row.values.get("is_impossible") is True
    id_value = row.values.get("id", f"{row.number}")
    return SquadRow(
        id=str(id_value),
        context=context,
        question=question,
        answers=[] if impossible else _answers(found, column, row),
        where=row.where,
    )


def _answers(found: Any, column: str, row: Row) -> list[str]:
    """Texts of `[{text}]`, `{text: [...]}` or a list of texts; an unanswerable question has none."""
    if isinstance(found, Mapping):
        found, column = found.get("text"), f"{column}.text"
    if not isinstance(found, list):
        message = f"{column} is {show_value(found)}, expected a list of answers (empty: the passage does not say)"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    paths = [f"{column}[{i}]" for i in range(len(found))]
    texts = [item.get("text") if isinstance(item, Mapping) else item for item in found]
    return [text_at(text, path, row) for text, path in zip(texts, paths)]

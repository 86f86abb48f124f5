"""Exact match and F1 as the official SQuAD v2 script counts them, and the run over questions that gives them.

The script (evaluate-v2.0.py, Rajpurkar et al. 2018, arXiv:1806.03822) is re-implemented from its behaviour, since it is
no library: normalised text, the best of the gold answers, abstaining right on questions without one.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchmask.errors import DataError

ABSTAIN = "?"
"""What a model writes for "the context does not say"."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Parsed:
    """What a generated text says.

    Args:
        answer: the answer; empty if the model abstained.
        malformed: the text holds no `{"answer": "..."}`; `answer` is then the stripped text.
    """

    answer: str
    malformed: bool = False


@dataclass(frozen=True)
class Answered:
    """One question with what was generated for it and whether that counts."""

    id: str
    question: str
    gold: tuple[str, ...]
    generated: str
    parsed: Parsed
    exact: bool


@dataclass(frozen=True)
class SquadEvaluation:
    """How a model did on a set of questions.

    Args:
        scores: `squad_scores`' table, percentages.
        num_malformed: generated texts without `{"answer": "..."}`.
        num_abstained: answers that say there is none.
        answered: every question, in order; the first ones serve as samples.
    """

    scores: Mapping[str, float]
    num_malformed: int
    num_abstained: int
    answered: Sequence[Answered] = field(repr=False)

    @property
    def exact_match(self) -> float:
        """Percentage of questions answered exactly."""
        return self.scores["exact"]


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous white space.

    >>> normalize_answer("The  'Great' Wall, a wonder")
    'great wall wonder'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_scores(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """The official script's table: `exact`, `f1`, `total`, and the same for `HasAns_...` and `NoAns_...`.

    Scores are percentages. A question without gold answers is right if the prediction is empty after normalising. The
    `HasAns` (`NoAns`) keys are there if such questions are. A question without a prediction scores 0, also where
    abstaining were right (the official script leaves it out of one total and stops at the next); predictions for
    questions that are not in `gold` are ignored.

    Args:
        gold: question id to its acceptable answers; an empty list if the context has none.
        predictions: question id to the answer; empty to abstain.

    Raises:
        DataError: D05 when there is no question.

    >>> squad_scores({"q": ["the Nile", "Nile"]}, {"q": "Nile river, the long Nile"})["f1"]
    40.0
    """
    if not gold:
        raise DataError("D05", "no questions to score", where="gold", fix="give at least one question")
    exact = {key: _best(_exact, answers, predictions.get(key)) for key, answers in gold.items()}
    f1 = {key: _best(_f1, answers, predictions.get(key)) for key, answers in gold.items()}
    table = _means(exact, f1, list(gold))
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        keys = [key for key, answers in gold.items() if bool(answers) is wanted]
        if keys:
            table |= {f"{prefix}_{name}": value for name, value in _means(exact, f1, keys).items()}
    return table


def parse_answer(text: str) -> Parsed:
    """Reads the first JSON object of a generated text, `{"answer": "..."}`.

    `"?"`, null and an empty string abstain; a number counts as its digits. Anything else is malformed: no object, one
    that ends early, one without `answer`, an answer that is a list or an object.

    >>> parse_answer('{"answer": "Lyon"} and more')
    Parsed(answer='Lyon', malformed=False)
    >>> parse_answer('{"answer": "?"}')
    Parsed(answer='', malformed=False)
    >>> parse_answer(' Lyon, I think ')
    Parsed(answer='Lyon, I think', malformed=True)
    """
    malformed = Parsed(text.strip(), malformed=True)
    found = _first_object(text)
    if found is None or "answer" not in found:
        return malformed
    answer = found["answer"]
    if answer is None:
        return Parsed("")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return malformed
    answer = str(answer).strip()
    return Parsed("" if answer == ABSTAIN else answer)


def json_answer(text: str) -> str:
    """The answer in a generated text, empty if the model abstained; the text itself if it is malformed."""
    return parse_answer(text).answer


def evaluate_squad(
    questions: Iterable[Mapping[str, Any]],
    generate: Callable[[Sequence[Mapping[str, Any]]], Sequence[str]],
    *,
    batch_size: int | None = None,
    parse: Callable[[str], Parsed] = parse_answer,
) -> SquadEvaluation:
    """Asks every question and scores the answers; a malformed text that is empty scores 0 on every question.

    Args:
        questions: rows with `id`, `context`, `question` and `answers`, a list of texts or SQuAD's
            `{"text": [...], "answer_start": [...]}`.
        generate: gives the generated text for each row; the caller knows the prompt, the tokenizer and the model.
        batch_size: rows that `generate` gets at a time; None = all.
        parse: takes the answer out of the text; `lambda text: Parsed(text.strip())` for plain-text answers.

    Raises:
        DataError: D05 without questions, D04 for a row without the fields or an id that is there twice.
    """
    rows = list(questions)
    gold: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("id", "question", "answers") if name not in row]
        if missing:
            raise DataError("D04", f"no {', '.join(missing)}; found {', '.join(row)}", where=f"question {number}")
        if row["id"] in gold:
            raise DataError("D04", f"id {row['id']!r} is there twice", where=f"question {number}")
        answers = row["answers"]
        gold[row["id"]] = list(answers["text"] if isinstance(answers, Mapping) else answers)
    size = batch_size or max(len(rows), 1)
    texts = [text for first in range(0, len(rows), size) for text in generate(rows[first : first + size])]
    assert len(texts) == len(rows), f"{len(texts)} answers for {len(rows)} questions"
    parsed = {row["id"]: parse(text) for row, text in zip(rows, texts)}
    # Writing nothing at all is no abstention, though the official script would take it for one.
    predictions = {key: value.answer for key, value in parsed.items() if value.answer or not value.malformed}
    scores = squad_scores(gold, predictions)
    answered = [
        Answered(
            id=row["id"],
            question=row["question"],
            gold=tuple(gold[row["id"]]),
            generated=text,
            parsed=parsed[row["id"]],
            exact=_best(_exact, gold[row["id"]], predictions.get(row["id"])) == 1.0,
        )
        for row, text in zip(rows, texts)
    ]
    return SquadEvaluation(
        scores=scores,
        num_malformed=sum(value.malformed for value in parsed.values()),
        num_abstained=sum(not value.malformed and not value.answer for value in parsed.values()),
        answered=answered,
    )


def _first_object(text: str) -> dict[str, Any] | None:
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]  # starts at a brace: an object if it is anything
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    return None


def _means(exact: Mapping[str, float], f1: Mapping[str, float], keys: Sequence[str]) -> dict[str, float]:
    total = len(keys)
    return {
        "exact": 100.0 * sum(exact[key] for key in keys) / total,
        "f1": 100.0 * sum(f1[key] for key in keys) / total,
        "total": total,
    }


def _best(score: Callable[[str, str], float], answers: Sequence[str], prediction: str | None) -> float:
    if prediction is None:
        return 0.0
    # Golds that are nothing but articles and punctuation do not count; with none left, abstaining is right.
    golds = [answer for answer in answers if normalize_answer(answer)] or [""]
    return max(score(answer, prediction) for answer in golds)


def _exact(gold: str, prediction: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(prediction))


def _f1(gold: str, prediction: str) -> float:
    gold_words, words = normalize_answer(gold).split(), normalize_answer(prediction).split()
    if not gold_words or not words:
        return float(gold_words == words)
    num_shared = sum((Counter(gold_words) & Counter(words)).values())
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(words), num_shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)

"""An evaluation as text: scores before and after, and a few questions with what was answered."""

from collections.abc import Sequence

from torchmask.evaluation.squad import ABSTAIN, Answered, SquadEvaluation

_MAX_CHARACTERS = 80  # of a user's data in one line, as everywhere in logs


def format_evaluation(title: str, evaluation: SquadEvaluation, *, num_samples: int = 3) -> str:
    """The scores of one evaluation in a line, and its first questions below."""
    return "\n".join(
        [
            f"{title}: {_scores(evaluation)}",
            *(f"  {line}" for answered in _samples(evaluation, num_samples) for line in _lines(answered)),
        ]
    )


def format_before_after(before: SquadEvaluation, after: SquadEvaluation, *, num_samples: int = 3) -> str:
    """Both evaluations of the same questions: scores one above the other, samples answered twice."""
    assert [a.id for a in before.answered] == [a.id for a in after.answered], "evaluations of different questions"
    then = {answered.id: answered for answered in before.answered}
    lines = [f"before: {_scores(before)}", f"after:  {_scores(after)}"]
    for answered in _samples(after, num_samples):
        lines += [
            f"  Q: {_short(answered.question)}   (right: {_gold(answered)})",
            f"     before: {_verdict(then[answered.id])}",
            f"     after:  {_verdict(answered)}",
        ]
    return "\n".join(lines)


def _samples(evaluation: SquadEvaluation, num_samples: int) -> Sequence[Answered]:
    """The first questions, the last of them replaced so that one without an answer is among them."""
    samples = list(evaluation.answered[:num_samples])
    if samples and all(answered.gold for answered in samples):
        without = next((answered for answered in evaluation.answered if not answered.gold), None)
        samples[-1] = without or samples[-1]
    return samples


def _scores(evaluation: SquadEvaluation) -> str:
    scores = evaluation.scores
    total = int(scores["total"])
    parts = [f"exact match {scores['exact']:.1f} %", f"F1 {scores['f1']:.1f} %"]
    if "HasAns_exact" in scores and "NoAns_exact" in scores:
        parts.append(f"answerable {scores['HasAns_exact']:.1f} %, unanswerable {scores['NoAns_exact']:.1f} %")
    parts.append(f"{total:,} question{'s' if total != 1 else ''}")
    if evaluation.num_malformed:
        parts.append(f"{evaluation.num_malformed:,} not as JSON")
    return "  ".join(parts)


def _lines(answered: Answered) -> list[str]:
    return [f"Q: {_short(answered.question)}   (right: {_gold(answered)})", f"   {_verdict(answered)}"]


def _verdict(answered: Answered) -> str:
    return f"{'right' if answered.exact else 'wrong'}  {_short(answered.generated)}"


def _gold(answered: Answered) -> str:
    return _short(" | ".join(dict.fromkeys(answered.gold))) if answered.gold else ABSTAIN


def _short(text: str) -> str:
    # One line, and nothing a terminal would obey: an untrained model writes any bytes.
    clean = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(clean.split())
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…"

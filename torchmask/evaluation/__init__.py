"""How good a model is: SQuAD v2's scores, answers read out of generated JSON, and both as text."""

from torchmask.evaluation.report import format_before_after, format_evaluation
from torchmask.evaluation.squad import (
    ABSTAIN,
    Answered,
    Parsed,
    SquadEvaluation,
    evaluate_squad,
    json_answer,
    normalize_answer,
    parse_answer,
    squad_scores,
)

__all__ = [
    "ABSTAIN",
    "Answered",
    "Parsed",
    "SquadEvaluation",
    "evaluate_squad",
    "format_before_after",
    "format_evaluation",
    "json_answer",
    "normalize_answer",
    "parse_answer",
    "squad_scores",
]

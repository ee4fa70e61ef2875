"""How good a model is: perplexity, bits per byte and per character."""

from mtnlg.evaluation.perplexity import (
    PerplexityResult,
    Score,
    evaluate_files,
    evaluate_perplexity,
    evaluate_run,
)
from mtnlg.evaluation.texts import EvaluationDocument, EvaluationText, texts_of_files, texts_of_run

__all__ = [
    "EvaluationDocument",
    "EvaluationText",
    "PerplexityResult",
    "Score",
    "evaluate_files",
    "evaluate_perplexity",
    "evaluate_run",
    "texts_of_files",
    "texts_of_run",
]

"""From prompts to sequences: the engine, its memory and runners, sampling, searches, rules, dialogue."""

from mtnlg.generation.distribution import choose_tokens, token_probabilities
from mtnlg.generation.engine import Engine, EngineClosedError, QueueFullError
from mtnlg.generation.generate import generate, run_together
from mtnlg.generation.request import (
    Generation,
    GenerationRequest,
    GenerationUsage,
    TokenEvent,
    TokenLogprobs,
)
from mtnlg.generation.sampling import SamplingRules
from mtnlg.generation.statistics import EngineStatistics, Histogram
from mtnlg.generation.text import IncrementalDecoder, TextStream, continuation_text

__all__ = [
    "Engine",
    "EngineClosedError",
    "EngineStatistics",
    "Generation",
    "GenerationRequest",
    "GenerationUsage",
    "Histogram",
    "IncrementalDecoder",
    "QueueFullError",
    "SamplingRules",
    "TextStream",
    "TokenEvent",
    "TokenLogprobs",
    "choose_tokens",
    "continuation_text",
    "generate",
    "run_together",
    "token_probabilities",
]

"""From logits to sequences: sampling rules, the key-value cache, the loop, streamed text."""

from mtnlg.generation.cache import KeyValueCache
from mtnlg.generation.distribution import choose_tokens, token_probabilities
from mtnlg.generation.engine import Engine, EngineClosedError, QueueFullError
from mtnlg.generation.generate import Continuation, generate, next_logits
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
    "Continuation",
    "Engine",
    "EngineClosedError",
    "EngineStatistics",
    "Generation",
    "GenerationRequest",
    "GenerationUsage",
    "Histogram",
    "IncrementalDecoder",
    "KeyValueCache",
    "QueueFullError",
    "SamplingRules",
    "TextStream",
    "TokenEvent",
    "TokenLogprobs",
    "choose_tokens",
    "continuation_text",
    "generate",
    "next_logits",
    "token_probabilities",
]

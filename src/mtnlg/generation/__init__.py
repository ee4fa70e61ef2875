"""From logits to sequences: sampling rules, the key-value cache, the loop, streamed text."""

from mtnlg.generation.cache import KeyValueCache
from mtnlg.generation.generate import Continuation, generate, next_logits
from mtnlg.generation.sampling import SamplingRules, choose_tokens, token_probabilities
from mtnlg.generation.text import IncrementalDecoder, continuation_text

__all__ = [
    "Continuation",
    "IncrementalDecoder",
    "KeyValueCache",
    "SamplingRules",
    "choose_tokens",
    "continuation_text",
    "generate",
    "next_logits",
    "token_probabilities",
]

"""Requests to a model with virtual tokens: the engine reads them with each prompt, nobody sees them."""

from __future__ import annotations

from mtnlg.config import ConfigError
from mtnlg.config.adapter import AdapterConfig
from mtnlg.generation.request import GenerationRequest


def longest_text(adapter: AdapterConfig | None, limit: int) -> int:
    """Most tokens of prompt and continuation where ``limit`` positions are there for all.

    Raises:
        ConfigError: virtual tokens leave none.
    """
    if adapter is None or not adapter.num_positions:
        return limit
    longest = min(limit, adapter.max_seq_length or limit) - adapter.num_positions
    if longest < 2:
        raise ConfigError(
            f"the adapter has {adapter.num_positions} virtual tokens and there are {limit} positions: "
            "nothing is left for text. Give the cache more memory, or use another adapter."
        )
    return longest


def refuse_with_virtual_tokens(adapter: AdapterConfig | None, request: GenerationRequest) -> None:
    """Refuse what is not told from virtual tokens.

    Raises:
        ConfigError: naming it.
    """
    if adapter is None or not adapter.num_positions:
        return
    if request.prompt_logprobs is not None:
        raise ConfigError("prompt_logprobs: the model has virtual tokens, which have no probabilities.")
    if request.hidden:
        raise ConfigError("embeddings: the model has virtual tokens, which a text's embedding is not of.")

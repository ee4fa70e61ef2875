"""How many parameters a config describes, by formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.config.moe import mlp_weights

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig


def count_parameters(config: MegatronModelConfig, active: bool = False) -> int:
    """Of the whole model.

    Args:
        config: the architecture.
        active: count of the experts only those that one token goes through.
    """
    layers = range(config.num_hidden_layers)
    return sum(count_layer(config, index, active) for index in layers) + _ends(config)


def count_layer(config: MegatronModelConfig, index: int, active: bool = False) -> int:
    """Of the Transformer layer number ``index``."""
    return _attention_and_norms(config) + mlp_weights(config, index, active) + _mlp_biases(config)


def _attention_and_norms(config: MegatronModelConfig) -> int:
    hidden, head = config.hidden_size, config.head_size
    query = config.num_attention_heads * head
    key_value = config.key_value_heads * head
    attention = hidden * (query + 2 * key_value) + query * hidden
    attention += (query + 2 * key_value) * config.attention_bias
    attention += hidden * config.has_attention_output_bias
    attention += 2 * head * config.qk_normalization
    return attention + 2 * _norm(config)


def _mlp_biases(config: MegatronModelConfig) -> int:
    up_matrices = 2 if config.is_gated else 1
    return (up_matrices * config.ffn_size + config.hidden_size) * config.mlp_bias


def _norm(config: MegatronModelConfig) -> int:
    return config.hidden_size * (2 if config.normalization == "layernorm" else 1)


def _ends(config: MegatronModelConfig) -> int:
    """Of embedding, positions, last norm and head."""
    embedding = config.vocab_size * config.hidden_size
    positions = config.max_position_embeddings * config.hidden_size
    count = embedding + positions * (config.position_embedding == "learned")
    return count + embedding * (not config.tie_word_embeddings) + _norm(config)

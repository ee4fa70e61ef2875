"""How many parameters a config describes, by formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.config.encoder_decoder import cross_attention_weights, encoder_decoder_ends
from mtnlg.config.moe import mlp_weights
from mtnlg.config.prompt_tuning import DEFAULT_TOKENS

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig


def count_parameters(config: MegatronModelConfig, active: bool = False) -> int:
    """Of the whole model.

    Args:
        config: the architecture.
        active: count of the experts only those that one token goes through.
    """
    layers = range(config.total_layers)
    return sum(count_layer(config, index, active) for index in layers) + _ends(config)


def count_layer(config: MegatronModelConfig, index: int, active: bool = False) -> int:
    """Of the Transformer layer number ``index``."""
    count = _attention_and_norms(config) + mlp_weights(config, index, active) + _mlp_biases(config)
    return count + cross_attention_weights(config, index)


def _attention_and_norms(config: MegatronModelConfig) -> int:
    hidden, head = config.hidden_size, config.head_size
    query = config.num_attention_heads * head
    key_value = config.key_value_heads * head
    attention = hidden * (query + 2 * key_value) + query * hidden
    attention += (query + 2 * key_value) * config.attention_bias
    attention += hidden * config.has_attention_output_bias
    attention += 2 * head * config.qk_normalization
    return attention + (4 if config.norm_placement == "around" else 2) * _norm(config)


def _mlp_biases(config: MegatronModelConfig) -> int:
    up_matrices = 2 if config.is_gated else 1
    return (up_matrices * config.ffn_size + config.hidden_size) * config.mlp_bias


def _norm(config: MegatronModelConfig) -> int:
    return config.hidden_size * (2 if config.normalization == "layernorm" else 1)


def _ends(config: MegatronModelConfig) -> int:
    """Of embedding, positions, last norm and head."""
    embedding = config.vocab_size * config.embedding_width
    rows = config.max_position_embeddings + config.position_offset
    count = embedding + rows * config.hidden_size * (config.position_embedding == "learned")
    if config.embedding_width != config.hidden_size:
        count += 2 * config.embedding_width * config.hidden_size
    norms = config.embedding_norm + (config.norm_placement != "after")
    count += embedding * (not config.tie_word_embeddings) + norms * _norm(config)
    if config.prompt_tuning:
        count += (config.prompt_tuning_num_tokens or DEFAULT_TOKENS) * config.embedding_width
    return count + encoder_decoder_ends(config)

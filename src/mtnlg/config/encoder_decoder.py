"""Encoder-decoders (T5, mT5, UL2) in a model's config: which fields are theirs, their rules and sizes."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

ARCHITECTURES = ("decoder", "encoder_decoder")
# What says something about encoder-decoders only, and so nothing without them.
ENCODER_DECODER_FIELDS = (
    "num_decoder_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "relative_attention_per_layer",
    "scale_output",
    "decoder_start_token_id",
    "pad_token_id",
    "eos_token_id",
)
# What else an encoder-decoder may set; it has no experts, windows and whatever decoders alone do.
SHARED_FIELDS = (
    "architecture vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings use_cache layernorm_eps init_method_std output_layer_init_method "
    "parallel_output activation_function pre_process_first post_process_last quantize quantize_config "
    "enable_input_require_grads num_key_value_heads head_dim position_embedding normalization "
    "tie_word_embeddings attention_bias attention_output_bias mlp_bias hidden_dropout attention_dropout"
)


def encoder_decoder_problems(config: MegatronModelConfig) -> list[str]:
    """Every reason why the fields do not fit the architecture."""
    defaults = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    changed = [name for name, default in defaults.items() if getattr(config, name) != default]
    if config.architecture == "decoder":
        problems = [
            f"{name} is {getattr(config, name)!r}: it says nothing without architecture: encoder_decoder."
            for name in changed
            if name in ENCODER_DECODER_FIELDS
        ]
        if config.position_embedding == "relative":
            problems.append(
                "position_embedding is 'relative': a decoder by itself has none; use rotary or learned."
            )
        return problems
    known = {*ENCODER_DECODER_FIELDS, *SHARED_FIELDS.split()}
    problems = [
        f"{name} is {getattr(config, name)!r}: an encoder-decoder does not have it; leave it out."
        for name in changed
        if name not in known
    ]
    if config.position_embedding != "relative":
        problems.append(
            f"position_embedding is {config.position_embedding!r}: an encoder-decoder's are 'relative'."
        )
    return problems + _number_problems(config)


def _number_problems(config: MegatronModelConfig) -> list[str]:
    problems = []
    if config.num_decoder_layers is not None and config.num_decoder_layers < 1:
        problems.append(f"num_decoder_layers is {config.num_decoder_layers}: it must be greater than 0.")
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets < 4 or buckets % 2:
        problems.append(f"relative_attention_num_buckets is {buckets}: it must be even and at least 4.")
    elif distance <= buckets // 2:
        problems.append(
            f"relative_attention_max_distance is {distance}: it must be more than half of "
            f"relative_attention_num_buckets ({buckets})."
        )
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
        if not 0 <= getattr(config, name) < config.vocab_size:
            problems.append(
                f"{name} is {getattr(config, name)}: it must be one of the {config.vocab_size} tokens."
            )
    return problems


def cross_attention_weights(config: MegatronModelConfig, index: int) -> int:
    """Parameters that layer ``index`` has beside those of a decoder's layer by itself.

    A decoder's layer has a second attention with its norm; with ``relative_attention_per_layer`` every
    layer has its positions.
    """
    count = config.relative_attention_num_buckets * config.num_attention_heads
    count *= config.relative_attention_per_layer
    if index < config.num_hidden_layers:
        return count
    hidden, head = config.hidden_size, config.head_size
    query, key_value = config.num_attention_heads * head, config.key_value_heads * head
    count += 2 * hidden * (query + key_value) + (query + 2 * key_value) * config.attention_bias
    count += hidden * config.has_attention_output_bias
    return count + hidden * (2 if config.normalization == "layernorm" else 1)


def encoder_decoder_ends(config: MegatronModelConfig) -> int:
    """Parameters outside the layers that a decoder by itself has not: two positions, the encoder's norm."""
    if config.architecture == "decoder":
        return 0
    positions = 2 * config.relative_attention_num_buckets * config.num_attention_heads
    norm = config.hidden_size * (2 if config.normalization == "layernorm" else 1)
    return positions * (not config.relative_attention_per_layer) + norm

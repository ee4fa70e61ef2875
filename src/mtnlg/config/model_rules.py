"""What a model's config may say: ranges, choices, shapes that fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.config.encoder_decoder import ARCHITECTURES

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared_relu", "silu", *GATED_ACTIVATIONS)
POSITION_EMBEDDINGS = ("learned", "rotary", "alibi", "relative", "none")
NORMALIZATIONS = ("layernorm", "rmsnorm", "rmsnorm_1p")
NORM_PLACEMENTS = ("before", "after", "around")
OUTPUT_LAYER_INIT_METHODS = ("scaled_normal", "normal", "zeros")


def range_problems(config: MegatronModelConfig) -> list[str]:
    """Every number that is out of its range."""
    positive = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
        "max_position_embeddings num_key_value_heads head_dim layernorm_eps init_method_std rotary_base "
        "rotary_local_base embedding_scale embedding_size logit_softcap attention_softcap attention_scalar "
        "sliding_window"
    )
    problems = []
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not value > 0:
            problems.append(f"{name} is {value}: it must be greater than 0.")
    for name in ("hidden_dropout", "attention_dropout"):
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            problems.append(f"{name} is {value}: it must be at least 0 and below 1.")
    if not 0.0 < config.rotary_percent <= 1.0:
        problems.append(f"rotary_percent is {config.rotary_percent}: it must be in (0, 1].")
    return problems


def choice_problems(config: MegatronModelConfig) -> list[str]:
    """Every name that is none of those known."""
    choices = {
        "activation_function": ACTIVATIONS,
        "architecture": ARCHITECTURES,
        "position_embedding": POSITION_EMBEDDINGS,
        "normalization": NORMALIZATIONS,
        "norm_placement": NORM_PLACEMENTS,
        "output_layer_init_method": (None, *OUTPUT_LAYER_INIT_METHODS),
    }
    return [
        f"{name} is {getattr(config, name)!r}: choose one of "
        f"{', '.join(str(choice) for choice in valid if choice)}."
        for name, valid in choices.items()
        if getattr(config, name) not in valid
    ]


def shape_problems(config: MegatronModelConfig) -> list[str]:
    """Every reason why the sizes do not fit together."""
    problems = []
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.head_dim is None and hidden % heads:
        problems.append(
            f"num_attention_heads is {heads}: it must divide hidden_size ({hidden}), or give head_dim."
        )
    if heads % config.key_value_heads:
        problems.append(
            f"num_key_value_heads is {config.key_value_heads}: it must divide "
            f"num_attention_heads ({heads})."
        )
    if config.position_embedding == "rotary" and config.rotary_dim < 2:
        problems.append(
            f"rotary_percent {config.rotary_percent} of a head of {config.head_size} dimensions "
            "rotates nothing: raise it, or use position_embedding: none."
        )
    return problems

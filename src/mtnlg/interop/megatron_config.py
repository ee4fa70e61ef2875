"""Megatron's options (``args`` of a checkpoint) as our config, and back."""

from __future__ import annotations

import argparse
from typing import Any

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.megatron_experts import expert_obstacles, experts_of_options, options_of_experts

_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "init_method_std",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "qk_layernorm": "qk_normalization",
    "rotary_percent": "rotary_percent",
}
_POSITIONS = {"learned_absolute": "learned", "rope": "rotary", "none": "none"}
_NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
# Options under which the model is another one than ours, and the values under which it is not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "embed_layernorm": (False,),
    "window_size": (None,),
    "spec": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
}


def config_of_options(options: Any, where: str, vocab_size: int | None = None) -> MegatronModelConfig:
    """Our config for the options of a run of Megatron-LM or Megatron-DeepSpeed.

    Args:
        options: the namespace that was saved beside the weights.
        where: its file, for messages.
        vocab_size: rows of the embedding in the files, used where the options do not say how many of
            them are tokens.

    Raises:
        CheckpointError: an option is missing, or the model is none that we compute.
    """
    given = dict(vars(options))
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not given.get(name)]
    wrong = [
        f"{name} is {given[name]!r}"
        for name, allowed in _MUST_BE.items()
        if given.get(name) not in (*allowed, None)
    ]
    if missing or wrong:
        problems = [f"{name} is missing" for name in missing] + wrong
        raise CheckpointError(
            f"{where}: Megatron's options: {'; '.join(problems)}: such a model cannot be read."
        )
    fields = {ours: given[name] for name, ours in _FIELDS.items() if given.get(name) is not None}
    groups = given.get("num_query_groups") if given.get("group_query_attention") else None
    eps = given.get("layernorm_epsilon", given.get("norm_epsilon"))
    bias = given.get("add_bias_linear", True)
    fields |= dict(
        vocab_size=given.get("vocab_size") or vocab_size or given.get("padded_vocab_size"),
        num_key_value_heads=groups,
        layernorm_eps=1e-5 if eps is None else eps,
        attention_bias=bool(bias or given.get("add_qkv_bias")),
        attention_output_bias=bool(bias),
        mlp_bias=bool(bias),
        tie_word_embeddings=not given.get("untie_embeddings_and_output_weights", False),
        rotary_base=float(given.get("rotary_base") or 10000.0),
        activation_function=_activation(given),
        normalization=_choice(_NORMS, given.get("normalization", "LayerNorm"), "normalization", where),
        position_embedding=_positions(given, where),
    )
    fields |= experts_of_options(given, where)
    if fields.get("head_dim", 0) * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["head_dim"]
    if fields["attention_output_bias"] == fields["attention_bias"]:
        del fields["attention_output_bias"]
    try:
        return MegatronModelConfig(**fields)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: Megatron's options do not make a model: {error}") from None


def _positions(given: dict[str, Any], where: str) -> str:
    if given.get("use_rotary_position_embeddings"):
        return "rotary"
    name = given.get("position_embedding_type", "learned_absolute")
    name = str(getattr(name, "name", name)).removeprefix("PositionEmbeddingType.")
    return _choice(_POSITIONS, name, "position_embedding_type", where)


def _choice(known: dict[str, str], name: str, option: str, where: str) -> str:
    if name not in known:
        raise CheckpointError(
            f"{where}: Megatron's {option} is {name!r}: only {', '.join(known)} can be computed."
        )
    return known[name]


def _activation(given: dict[str, Any]) -> str:
    """Megatron's fused GELU is the tanh formula, its plain one is exact."""
    if given.get("swiglu"):
        return "swiglu"
    if given.get("squared_relu"):
        return "squared_relu"
    is_tanh = given.get("openai_gelu") or given.get("bias_gelu_fusion", False)
    return "gelu_tanh" if is_tanh else "gelu"


def options_of_config(config: MegatronModelConfig, dtype: str) -> argparse.Namespace:
    """The options that Megatron-LM's ``--use-checkpoint-args`` takes from a checkpoint.

    Raises:
        ConfigError: Megatron-LM does not compute this model; what is in the way is named.
    """
    problems = _obstacles(config)
    if problems:
        raise ConfigError(["Megatron-LM's GPT model does not compute this one:", *problems])
    inverse = {ours: theirs for theirs, ours in _POSITIONS.items()}
    options: dict[str, Any] = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    options |= dict(
        ffn_hidden_size=config.ffn_size,
        kv_channels=config.head_size,
        init_method_std=config.init_std,
        seq_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        make_vocab_size_divisible_by=1,
        group_query_attention=config.key_value_heads != config.num_attention_heads,
        num_query_groups=config.key_value_heads,
        norm_epsilon=config.layernorm_eps,
        layernorm_epsilon=config.layernorm_eps,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.attention_bias,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        rotary_base=int(config.rotary_base),
        swiglu=config.activation_function == "swiglu",
        squared_relu=config.activation_function == "squared_relu",
        bias_gelu_fusion=config.activation_function == "gelu_tanh",
        openai_gelu=False,
        normalization="RMSNorm" if config.normalization == "rmsnorm" else "LayerNorm",
        position_embedding_type=inverse[config.position_embedding],
        use_rotary_position_embeddings=config.position_embedding == "rotary",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        tokenizer_type="HuggingFaceTokenizer",
    )
    options |= options_of_experts(config)
    return argparse.Namespace(**options)


def _obstacles(config: MegatronModelConfig) -> list[str]:
    required = dict(
        architecture="decoder",
        norm_placement="before",
        parallel_residual=False,
        embedding_norm=False,
        embedding_scale=None,
        embedding_size=None,
        logit_softcap=None,
        attention_softcap=None,
        attention_scalar=None,
        sliding_window=None,
        rotary_scaling=None,
        rotary_local_base=None,
        position_offset=0,
    )
    found = config.to_dict() | dict(attention_output_bias=config.has_attention_output_bias)
    problems = [
        f"{name} is {found[name]!r}: it must be {value!r}."
        for name, value in required.items()
        if name in found and found[name] != value
    ]
    if config.has_attention_output_bias != config.mlp_bias:
        problems.append(
            f"attention_output_bias is {config.has_attention_output_bias} and mlp_bias {config.mlp_bias}: "
            "they must be equal."
        )
    problems += expert_obstacles(config)
    if config.mlp_bias and not config.attention_bias:
        problems.append("attention_bias is False: with mlp_bias it must be True.")
    choices = dict(
        position_embedding=_POSITIONS.values(),
        normalization=_NORMS.values(),
        activation_function=("gelu", "gelu_tanh", "swiglu", "squared_relu"),
    )
    return problems + [
        f"{name} is {found[name]!r}: it must be one of {', '.join(values)}."
        for name, values in choices.items()
        if found[name] not in values
    ]

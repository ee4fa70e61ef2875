"""Our config as a Hugging Face ``config.json`` and back: GPT-2, Llama, Qwen2, Qwen3, and with experts
Mixtral, Qwen3-MoE and GLM-4-MoE."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.architecture import LLAMA_DEFAULTS, LLAMA_FIELDS, Architecture
from mtnlg.interop.encoder_decoder_families import (
    ENCODER_DECODER_FAMILIES,
    encoder_decoder_from_saved,
    encoder_decoder_to_saved,
    nearest_encoder_decoder,
)
from mtnlg.interop.moe_families import MOE_FAMILIES, moe_from_saved, moe_requirements, moe_to_saved

OWN_KEY = "mtnlg"  # our whole config rides along in config.json, for what the family cannot say
_PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}
_GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


_GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    fields=dict(
        vocab_size="vocab_size",
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        intermediate_size="n_inner",
        max_position_embeddings="n_positions",
        layernorm_eps="layer_norm_epsilon",
        init_method_std="initializer_range",
        hidden_dropout="resid_pdrop",
        attention_dropout="attn_pdrop",
        tie_word_embeddings="tie_word_embeddings",
        use_cache="use_cache",
    ),
    defaults=dict(
        vocab_size=50257,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=None,
        n_positions=1024,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        tie_word_embeddings=True,
        use_cache=True,
        activation_function="gelu_new",
    ),
    unsupported=dict(
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
)

_QWEN_DEFAULTS = LLAMA_DEFAULTS | dict(
    vocab_size=151936, num_key_value_heads=32, intermediate_size=22016, max_position_embeddings=32768
)
_LLAMA = Architecture("llama", "LlamaForCausalLM", LLAMA_FIELDS, LLAMA_DEFAULTS, {})
_QWEN2 = Architecture(
    "qwen2", "Qwen2ForCausalLM", LLAMA_FIELDS, _QWEN_DEFAULTS, dict(use_sliding_window=(False,))
)
_QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA_FIELDS,
    _QWEN_DEFAULTS | dict(head_dim=128),
    dict(use_sliding_window=(False,)),
)
ARCHITECTURES = {
    family.model_type: family for family in (_GPT2, _LLAMA, _QWEN2, _QWEN3, *MOE_FAMILIES.values())
} | ENCODER_DECODER_FAMILIES


def nearest_architecture(config: MegatronModelConfig) -> Architecture:
    """The family that computes exactly what ``config`` describes.

    Raises:
        ConfigError: there is none; each field in the way of the nearest one is named.
    """
    if config.architecture == "encoder_decoder":
        return nearest_encoder_decoder(config)
    has_experts = config.num_experts is not None
    decoders = [name for name in ARCHITECTURES if name not in ENCODER_DECODER_FAMILIES]
    candidates = [name for name in decoders if (name in MOE_FAMILIES) == has_experts]
    problems = {name: _obstacles(name, config) for name in candidates}
    best = min(problems, key=lambda name: len(problems[name]))
    if problems[best]:
        raise ConfigError(
            [f"no Hugging Face architecture computes this model; the nearest is {best}, but:"]
            + [f"  {problem}" for problem in problems[best]]
        )
    return ARCHITECTURES[best]


def _obstacles(model_type: str, config: MegatronModelConfig) -> list[str]:
    """Every field of ``config`` that ``model_type`` cannot express."""
    is_gpt2, is_qwen = model_type == "gpt2", model_type.startswith("qwen")
    required: dict[str, Any] = dict(
        position_embedding="learned" if is_gpt2 else "rotary",
        normalization="layernorm" if is_gpt2 else "rmsnorm",
        qk_normalization=model_type == "qwen3",
    )
    if is_gpt2:
        required |= dict(attention_bias=True, mlp_bias=True)
        required |= dict(num_key_value_heads=config.num_attention_heads)
    else:
        required |= dict(rotary_percent=1.0)
    if is_qwen:
        required |= dict(mlp_bias=False)
    if model_type == "qwen2":
        required |= dict(attention_bias=True)
    output_bias = False if model_type == "qwen2" else config.attention_bias
    effective = {
        "num_key_value_heads": config.key_value_heads,
        "attention_output_bias": config.has_attention_output_bias,
    }
    required["attention_output_bias"] = output_bias
    if model_type in MOE_FAMILIES:
        required |= moe_requirements(model_type, config)
    problems = []
    for name, value in required.items():
        found = effective.get(name, getattr(config, name))
        if found != value:
            problems.append(f"{name} is {found!r}: it must be {value!r}.")
    if config.is_gated == is_gpt2:
        kind = "one without a gate" if is_gpt2 else "a gated one (swiglu, geglu, reglu)"
        problems.append(f"activation_function is {config.activation_function!r}: it must be {kind}.")
    if is_gpt2 and config.head_size * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim is {config.head_dim}: it must be hidden_size / num_attention_heads.")
    return problems


def to_hugging_face(config: MegatronModelConfig) -> dict[str, Any]:
    """The ``config.json`` of the nearest architecture.

    Raises:
        ConfigError: no architecture fits, and why.
    """
    family = nearest_architecture(config)
    if config.architecture == "encoder_decoder":
        written = encoder_decoder_to_saved(config)
        return _with_names(family, written, config)
    values = {**config.to_dict(), **_derived(config)}
    written = {key: values[name] for name, key in family.fields.items()}
    if family is _GPT2:
        names = {ours: theirs for theirs, ours in reversed(_PLAIN_ACTIVATIONS.items())}
        written |= dict(
            activation_function=names[config.activation_function], embd_pdrop=config.hidden_dropout
        )
    else:
        names = {ours: theirs for theirs, ours in reversed(_GATED_ACTIVATIONS.items())}
        rope = dict(rope_theta=config.rotary_base, rope_type="default")
        written |= dict(
            hidden_act=names[config.activation_function],
            rope_theta=config.rotary_base,  # read by transformers before 5
            rope_parameters=rope,  # read since
        )
        if family is not _QWEN2:
            written["attention_bias"] = config.attention_bias
        if family.model_type in MOE_FAMILIES:
            written |= moe_to_saved(family.model_type, config)
        if family is _LLAMA:
            written["mlp_bias"] = config.mlp_bias
    return _with_names(family, written, config)


def _with_names(
    family: Architecture, written: dict[str, Any], config: MegatronModelConfig
) -> dict[str, Any]:
    names = dict(model_type=family.model_type, architectures=[family.class_name])
    return {**names, **written, OWN_KEY: config.to_dict()}


def _derived(config: MegatronModelConfig) -> dict[str, Any]:
    return dict(
        intermediate_size=config.ffn_size,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_size,
        init_method_std=config.init_std,
        moe_intermediate_size=config.expert_ffn_size,
        router_aux_loss_coefficient=config.aux_loss_coefficient,
    )


def from_hugging_face(saved: dict[str, Any], where: str) -> MegatronModelConfig:
    """Our config for a parsed ``config.json``.

    Args:
        saved: the parsed file.
        where: its path, for messages.

    Raises:
        CheckpointError: the architecture or one of its settings is not ours to compute.
    """
    family = ARCHITECTURES.get(saved.get("model_type", ""))
    if family is None:
        raise CheckpointError(
            f"{where}: model_type is {saved.get('model_type')!r}: only "
            f"{', '.join(ARCHITECTURES)} can be read."
        )
    _refuse_unsupported(family, saved, where)
    if family.model_type in ENCODER_DECODER_FAMILIES:
        return encoder_decoder_from_saved(saved, where, saved.get(OWN_KEY))
    values = {**family.defaults, **saved}
    known = {name: values[key] for name, key in family.fields.items()}
    known |= _from_gpt2(values, where) if family is _GPT2 else _from_llama(family, values, where)
    return MegatronModelConfig(**_without_overruling(saved.get(OWN_KEY), known))


def _without_overruling(own: dict[str, Any] | None, known: dict[str, Any]) -> dict[str, Any]:
    """Our own saved fields where they agree with the family's keys; the family's keys win."""
    if not isinstance(own, dict):
        return known
    names = {field.name for field in fields(MegatronModelConfig)}
    own = {name: value for name, value in own.items() if name in names}
    before = MegatronModelConfig(**own)
    derived = {**before.to_dict(), **_derived(before)}
    derived["attention_output_bias"] = before.has_attention_output_bias
    changed = {name: value for name, value in known.items() if derived[name] != value}
    return {**own, **changed}


def _refuse_unsupported(family: Architecture, saved: dict[str, Any], where: str) -> None:
    problems = [
        f"{key} is {saved[key]!r}: only {', '.join(map(repr, allowed))} can be computed."
        for key, allowed in family.unsupported.items()
        if key in saved and saved[key] not in allowed
    ]
    if saved.get("quantization_config"):
        problems.append("quantization_config is given: only unquantized weights can be read.")
    if problems:
        raise CheckpointError("\n".join(f"{where}: {problem}" for problem in problems))


def _from_gpt2(values: dict[str, Any], where: str) -> dict[str, Any]:
    embedding_dropout = values.get("embd_pdrop", values["resid_pdrop"])
    if embedding_dropout != values["resid_pdrop"]:
        warnings.warn(
            f"{where}: embd_pdrop ({embedding_dropout}) differs from resid_pdrop "
            f"({values['resid_pdrop']}); training on would use the latter for both.",
            stacklevel=2,
        )
    return dict(
        position_embedding="learned",
        normalization="layernorm",
        activation_function=_activation(values["activation_function"], _PLAIN_ACTIVATIONS, where),
    )


def _from_llama(family: Architecture, values: dict[str, Any], where: str) -> dict[str, Any]:
    is_qwen2 = family is _QWEN2
    attention_bias = True if is_qwen2 else values["attention_bias"]
    found: dict[str, Any] = dict(
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function=_activation(values["hidden_act"], _GATED_ACTIVATIONS, where),
        rotary_base=_rotary_base(values, where),
        attention_bias=attention_bias,
        attention_output_bias=False if is_qwen2 else attention_bias,
        mlp_bias=values["mlp_bias"] if family is _LLAMA else False,
        qk_normalization=family is _QWEN3,
    )
    if family.model_type in MOE_FAMILIES:
        found |= moe_from_saved(family.model_type, values, where)
    return found


def _rotary_base(values: dict[str, Any], where: str) -> float:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{where}: rotary positions are scaled ({kind!r}): only unscaled ones can be computed."
        )
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor is {share}: only 1.0 can be computed.")
    return float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))


def _activation(name: str, known: dict[str, str], where: str) -> str:
    if name not in known:
        raise CheckpointError(f"{where}: activation {name!r} is unknown: one of {', '.join(known)} is.")
    return known[name]

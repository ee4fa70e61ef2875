"""What a GGUF file says of the architecture: our config as its keys, and back.

Keys are those of the package ``gguf`` (``gguf.constants.Keys``) without the architecture's name in front.
Our whole config goes along as one key of our own, for what the keys cannot say; it is believed where the
keys say what it would have written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.architectures import ARCHITECTURES, OWN_KEY
from mtnlg.interop.gguf_families import FAMILIES, GgufFamily, gemma_attention_scalar, gguf_family
from mtnlg.interop.gguf_tensors import (
    ALL_FACTORS,
    LONG_FACTORS,
    ROTARY_FACTORS,
    SHORT_FACTORS,
    rotary_factors,
)
from mtnlg.model.rotary_scaling import rotary_frequencies

OWN_CONFIG = f"{OWN_KEY}.config"
EXACT = f"{OWN_KEY}.exact"  # vectors as they were, where the way to the file rounds
_SIGMOID = 2  # gguf.ExpertGatingFuncType
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_PATTERNS = {"gemma2": 2, "gemma3": 6}  # every so many-th layer sees everything, where nothing is said
_READ = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "decoder_block_count": "num_decoder_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_epsilon": "layernorm_eps",
    "attention.layer_norm_rms_epsilon": "layernorm_eps",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
    "rope.freq_base": "rotary_base",
    "rope.freq_base_swa": "rotary_local_base",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_token",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "num_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_scale": "router_scaling_factor",
    "expert_weights_norm": "normalize_router_weights",
    "leading_dense_block_count": "num_dense_layers_first",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "use_parallel_residual": "parallel_residual",
    "decoder_start_token_id": "decoder_start_token_id",
}


def gguf_settings(config: MegatronModelConfig) -> dict[str, Any]:
    """Key without the architecture's name → value."""
    family = gguf_family(config)
    length = config.max_position_embeddings
    if config.sliding_window is not None and not family.has_windows:
        length = min(length, config.sliding_window)  # so far all sees the same
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.key_value_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
    }
    is_rms = config.normalization != "layernorm"
    settings[f"attention.layer_norm_{'rms_' if is_rms else ''}epsilon"] = float(config.layernorm_eps)
    settings |= _expert_settings(family, config) | _window_settings(family, config)
    if config.position_embedding == "rotary":
        settings |= _rotary_settings(config)
    if family.name == "gptneox":
        settings["use_parallel_residual"] = config.parallel_residual
    if config.has_encoder:
        settings |= {
            "decoder_block_count": config.decoder_layers,
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "decoder_start_token_id": config.decoder_start_token_id,
        }
    return settings


def _expert_settings(family: GgufFamily, config: MegatronModelConfig) -> dict[str, Any]:
    if config.num_experts is None:
        return {}
    settings: dict[str, Any] = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_token,
        "expert_feed_forward_length": config.expert_ffn_size,
    }
    if family.name == "llama":  # it knows one width, and has experts in every layer
        settings["feed_forward_length"] = config.expert_ffn_size
    if family.name == "qwen2moe":
        settings["expert_shared_feed_forward_length"] = config.shared_expert_size
    if family.name == "glm4moe":
        settings |= {
            "expert_shared_count": config.num_shared_experts,
            "leading_dense_block_count": config.num_dense_layers_first,
            "expert_weights_scale": float(config.router_scaling_factor),
            "expert_weights_norm": config.normalize_router_weights,
            "expert_gating_func": _SIGMOID,
        }
    return settings


def _window_settings(family: GgufFamily, config: MegatronModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if config.attention_softcap is not None:
        settings["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap is not None:
        settings["final_logit_softcapping"] = float(config.logit_softcap)
    if not family.has_windows:
        return settings
    settings["attention.sliding_window"] = config.sliding_window or config.max_position_embeddings
    layers = range(config.num_hidden_layers)
    has_window = [config.window_of_layer(layer) is not None for layer in layers]
    if has_window != [not is_full for is_full in _full_layers(family.name, len(layers))]:
        settings["attention.sliding_window_pattern"] = has_window
    return settings


def _full_layers(name: str, count: int) -> list[bool]:
    """Whether each layer sees everything, where a file says nothing."""
    return [(layer + 1) % _PATTERNS[name] == 0 for layer in range(count)]


def _rotary_settings(config: MegatronModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rotary_base),
    }
    if config.rotary_local_base is not None:
        settings["rope.freq_base_swa"] = float(config.rotary_local_base)
    scaling = config.rotary_scaling or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn", "longrope"):
        return settings
    settings["rope.scaling.type"] = kind
    if kind == "linear":
        return settings | {"rope.scaling.factor": float(scaling["factor"])}
    _, attention = rotary_frequencies(config, torch.zeros(1, 1, dtype=torch.long))
    if kind == "yarn":
        settings["rope.scaling.factor"] = float(scaling["factor"])
        attention /= _yarn_attention(scaling["factor"])  # llama.cpp multiplies by that itself
    settings["rope.scaling.original_context_length"] = int(scaling[_ORIGINAL])
    return settings | {"rope.scaling.attn_factor": float(attention)}


def _yarn_attention(factor: float) -> float:
    return 1.0 + 0.1 * math.log(factor)


def config_of_gguf(
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    where: str,
) -> MegatronModelConfig:
    """The architecture in a file's header.

    Args:
        fields: all keys.
        tensors: the shape of each tensor, outermost axis first.
        read: a tensor by name.
        where: the file, for messages.

    Raises:
        CheckpointError: the architecture is not ours to compute, or its settings make no model.
    """
    name = fields.get("general.architecture")
    model_types = {family.name: model_type for model_type, family in FAMILIES.items()}
    if name not in model_types:
        raise CheckpointError(
            f"{where}: general.architecture is {name!r}: only {', '.join(sorted(model_types))} can be read."
        )
    own = _own_config(fields)
    if own is not None and _says_the_same(own, fields, tensors, read):
        return own
    model_type = model_types[name]
    if name == "llama" and f"{name}.expert_count" not in fields:
        model_type = "llama"
    elif name == "llama":
        model_type = "mixtral"
    try:
        found = _known(name, fields)
        if name == "t5":
            found |= _encoder_decoder_fields(fields, tensors)
        else:
            found |= _decoder_fields(model_type, found, tensors)
            found |= _windows(name, fields, found["num_hidden_layers"])
            found |= _rotary_fields(name, fields, tensors, read, found)
        found["vocab_size"] = tensors["token_embd.weight"][0]
        config = MegatronModelConfig(**found)
        if name in _PATTERNS:
            config.attention_scalar = gemma_attention_scalar(FAMILIES[model_type], config)
        return config
    except (ConfigError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: its settings do not make a model: {error}") from None


def _own_config(fields: Mapping[str, Any]) -> MegatronModelConfig | None:
    """Ours, as it was saved; ``None`` where the file has none, or one that this release cannot read."""
    try:
        return MegatronModelConfig(**json.loads(fields[OWN_CONFIG]))
    except (KeyError, TypeError, ValueError, ConfigError):
        return None


def _says_the_same(
    own: MegatronModelConfig,
    fields: Mapping[str, Any],
    tensors: Collection[str],
    read: Callable[[str], Tensor],
) -> bool:
    """Whether the file still says what a file of ``own`` says: other programs may have changed it."""
    name = fields["general.architecture"]
    if gguf_family(own).name != name:
        return False
    written = {f"{name}.{key}": value for key, value in gguf_settings(own).items()}
    alike = all(_number(fields.get(key)) == _number(value) for key, value in written.items())
    factors = [factor for factor in ALL_FACTORS if factor in tensors]
    return alike and all(_has_factors(own, factor, read) for factor in factors)


def _has_factors(own: MegatronModelConfig, name: str, read: Callable[[str], Tensor]) -> bool:
    return own.rotary_scaling is not None and torch.allclose(read(name), rotary_factors(own, name).float())


def _number(value: Any) -> Any:
    """A setting as it was written: files keep float32 of it."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _known(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        ours: _number(fields[f"{name}.{key}"]) for key, ours in _READ.items() if f"{name}.{key}" in fields
    }
    uneven = [key for key, value in found.items() if isinstance(value, list)]
    if uneven:
        raise ValueError(f"{', '.join(uneven)} differ between layers.")
    if found.get("head_dim", 0) * found["num_attention_heads"] == found["hidden_size"]:
        del found["head_dim"]
    if found.get("router_scaling_factor") == 0.0:  # as good as none
        del found["router_scaling_factor"]
    return found


def _decoder_fields(
    model_type: str, found: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """What the family is by itself, and what the tensors that are there say."""
    family = FAMILIES[model_type]
    query = "attn_qkv" if family.joins_queries else "attn_q"
    fields = dict(
        activation_function=family.activations[0],
        attention_bias=f"blk.0.{query}.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_normalization="blk.0.attn_q_norm.weight" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        exported_as=model_type,
    )
    fixed = {name: value for name, value in ARCHITECTURES[model_type].fixed.items() if value is not None}
    fields |= fixed | family.fixed | dict(attention_output_bias="blk.0.attn_output.bias" in tensors)
    if family.norm_less_one:
        fields["embedding_scale"] = found["hidden_size"] ** 0.5
    if "num_experts" in found and "moe_intermediate_size" not in found:
        parts = 1 if model_type == "mixtral" else found["num_experts_per_token"]
        fields["moe_intermediate_size"] = found["intermediate_size"] // parts
    if model_type == "mixtral":
        fields["moe_intermediate_size"] = found["intermediate_size"]
    if model_type == "glm4_moe":
        fields["normalize_router_weights"] = found.get("normalize_router_weights", False)
    return fields


def _encoder_decoder_fields(
    fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Those of a T5: nothing scales what its head reads, as in llama.cpp (in UMT5 the norm undoes it)."""
    gated = "enc.blk.0.ffn_gate.weight" in tensors
    is_umt5 = "enc.blk.1.attn_rel_b.weight" in tensors
    return dict(
        architecture="encoder_decoder",
        position_embedding="relative",
        normalization="rmsnorm",
        attention_bias=False,
        mlp_bias=False,
        activation_function="geglu_tanh" if gated else "relu",
        relative_attention_per_layer=is_umt5,
        tie_word_embeddings="output.weight" not in tensors,
        scale_output=is_umt5,
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id", 0),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id", 1),
    )


def _windows(name: str, fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    window = fields.get(f"{name}.attention.sliding_window", 4096 if name == "gemma2" else 0)
    if name not in _PATTERNS or not window:
        return {}
    said = fields.get(f"{name}.attention.sliding_window_pattern")
    full = _full_layers(name, count) if said is None else [not has for has in said]
    layers = [layer for layer, is_full in enumerate(full) if is_full]
    return dict(sliding_window=window, full_attention_layers=layers or None)


def _rotary_fields(
    name: str,
    fields: Mapping[str, Any],
    tensors: Collection[str],
    read: Callable[[str], Tensor],
    found: dict[str, Any],
) -> dict[str, Any]:
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    size = found.get("head_dim", hidden // heads)
    fixed: dict[str, Any] = {}
    if (turned := fields.get(f"{name}.rope.dimension_count", size)) != size:
        fixed["rotary_percent"] = turned / size
    if name == "gemma3" and f"{name}.attention.sliding_window" in fields:
        fixed["rotary_local_base"] = found.get("rotary_local_base", 10000.0)

    def said(key: str, default: Any) -> Any:
        return _number(fields.get(f"{name}.rope.scaling.{key}", default))

    kind, factor = said("type", "linear"), said("factor", 1.0)
    original = said("original_context_length", found["max_position_embeddings"])
    if LONG_FACTORS in tensors or ROTARY_FACTORS in tensors:
        scaling = _llama3(read, found | dict(size=size)) if ROTARY_FACTORS in tensors else None
        scaling = scaling or _scaling_of_factors(tensors, read, original, said("attn_factor", 1.0))
    elif kind == "yarn":
        attention = said("attn_factor", 1.0) * _yarn_attention(factor)
        scaling = {"rope_type": kind, "factor": factor, _ORIGINAL: original, "attention_factor": attention}
    elif kind == "linear" and factor not in (0.0, 1.0):
        scaling = {"rope_type": kind, "factor": factor}
    elif kind in ("none", "linear", "longrope"):
        return fixed
    else:
        raise ValueError(f"rope.scaling.type is {kind!r}: linear, yarn and longrope can be read.")
    return fixed | dict(rotary_scaling=scaling)


def _llama3(read: Callable[[str], Tensor], found: dict[str, Any]) -> dict[str, Any] | None:
    """The way of Llama 3.1 to scale, where the factors are its own for the lengths it was released with."""
    factors = read(ROTARY_FACTORS)
    scaling = dict(rope_type="llama3", factor=_number(float(factors.max())), **_LLAMA3)
    known = MegatronModelConfig(
        hidden_size=found["size"],
        num_attention_heads=1,
        position_embedding="rotary",
        rotary_base=found["rotary_base"],
        rotary_scaling=scaling,
    )
    is_it = torch.allclose(rotary_factors(known, ROTARY_FACTORS), factors, rtol=1e-5)
    return scaling if is_it and scaling["factor"] > 1 else None


def _scaling_of_factors(
    tensors: Collection[str], read: Callable[[str], Tensor], original: int, attention: float
) -> dict[str, Any]:
    """Factors as they are: they do not say what they were computed from."""
    long = LONG_FACTORS if LONG_FACTORS in tensors else ROTARY_FACTORS
    short = SHORT_FACTORS if SHORT_FACTORS in tensors else long
    return {
        "rope_type": "longrope",
        "long_factor": read(long).tolist(),
        "short_factor": read(short).tolist(),
        _ORIGINAL: original,
        "attention_factor": attention,
    }

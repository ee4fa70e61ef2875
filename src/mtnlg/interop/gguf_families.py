"""What llama.cpp calls our parameters, family by family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.interop.architectures import nearest_architecture
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.rotary_scaling import plain_frequencies, rotary_frequencies


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp.

    Args:
        name: its ``general.architecture``.
        activations: those of ours that its graph computes.
        fuses_queries: queries, keys and values are one tensor, ``attn_qkv``.
        turns_pairs: rotary positions turn neighbouring rows of a head, where ours turn its two halves.
    """

    name: str
    activations: tuple[str, ...]
    fuses_queries: bool = False
    turns_pairs: bool = False


_FIXED_FREQUENCIES = ("linear", "llama3")  # whatever the text's length: one factor for each pair
ROTARY_FACTORS = "rope_freqs.weight"
_LLAMA = GgufFamily("llama", ("swiglu",), turns_pairs=True)
FAMILIES = {  # by Hugging Face's name
    "gpt2": GgufFamily("gpt2", ("gelu_tanh", "gelu"), fuses_queries=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", ("swiglu",)),
    "qwen3": GgufFamily("qwen3", ("swiglu",)),
    "qwen3_moe": GgufFamily("qwen3moe", ("swiglu",)),
}
_ENDS = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "head.norm": "output_norm",
    "head.output": "output",
}
_PARTS = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate": "ffn_gate_exps",
    "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.down": "ffn_down_exps",
}
_PLACE = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<part>.+?)(?:\.(?P<kind>weight|bias))?")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Args:
        name: llama.cpp's.
        ours: our parameters, which it holds one after the other along the output axis; none for
            ``ROTARY_FACTORS``.
        shape: of it, outermost axis first.
        heads: rows are to be reordered within so many heads; ``None`` leaves them.
    """

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int | None = None


def gguf_family(config: MegatronModelConfig) -> GgufFamily:
    """What llama.cpp runs ``config`` as.

    Raises:
        ConfigError: it has nothing that computes this model.
    """
    model_type = nearest_architecture(config).model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"GGUF: models of the family {model_type} cannot be written; only {', '.join(FAMILIES)} can."
        )
    if config.sliding_window is not None:
        raise ConfigError(f"GGUF: sliding_window is {config.sliding_window}: it must be None.")
    scaling = (config.rotary_scaling or {}).get("rope_type")
    if scaling is not None and not (family is _LLAMA and scaling in _FIXED_FREQUENCIES):
        kinds = " or ".join(_FIXED_FREQUENCIES)
        raise ConfigError(
            f"GGUF: rotary_scaling is {scaling!r} in a {family.name}: it must be {kinds} in a llama."
        )
    if config.activation_function not in family.activations:
        raise ConfigError(
            f"GGUF: activation_function is {config.activation_function!r}: llama.cpp computes "
            f"{family.name} with {' or '.join(family.activations)} only."
        )
    return family


def gguf_tensors(config: MegatronModelConfig) -> list[GgufTensor]:
    """All tensors of a file, in the order of the model.

    Raises:
        ConfigError: llama.cpp has nothing that computes this model.
    """
    family = gguf_family(config)
    with torch.device("meta"):
        state = MegatronLmDecoder(config).state_dict()
    if config.tie_word_embeddings:
        del state["head.output.weight"]
    shapes = {name: tuple(parameter.shape) for name, parameter in state.items()}
    found = []
    if config.rotary_scaling is not None:
        found.append(GgufTensor(ROTARY_FACTORS, (), (config.rotary_dim // 2,)))
    for ours, shape in shapes.items():
        if family.fuses_queries and ".attention.query." in ours:
            parts = tuple(ours.replace("query", part) for part in ("query", "key", "value"))
            rows = sum(shapes[part][0] for part in parts)
            name = gguf_name(ours).replace("attn_q", "attn_qkv")
            found.append(GgufTensor(name, parts, (rows, *shape[1:])))
        elif not (family.fuses_queries and re.search(r"\.attention\.(key|value)\.", ours)):
            found.append(GgufTensor(gguf_name(ours), (ours,), shape, _heads(family, config, ours)))
    return found


def gguf_name(ours: str) -> str:
    """llama.cpp's name of a parameter of ours."""
    match = _PLACE.fullmatch(ours)
    assert match is not None
    kind = match["kind"] or "weight"
    if ours.endswith("router.selection_bias"):
        return f"blk.{match['layer']}.exp_probs_b.bias"
    if match["layer"] is None:
        return f"{_ENDS[match['part']]}.{kind}"
    return f"blk.{match['layer']}.{_PARTS[match['part']]}.{kind}"


def rotary_factors(config: MegatronModelConfig) -> Tensor:
    """What llama.cpp divides the frequency of each pair by, float32."""
    scaled, _ = rotary_frequencies(config, torch.zeros(1, 1, dtype=torch.long))
    plain = plain_frequencies(config.rotary_base, config.rotary_dim, torch.device("cpu"))
    return (plain / scaled).flatten()


def _heads(family: GgufFamily, config: MegatronModelConfig, ours: str) -> int | None:
    if not family.turns_pairs:
        return None
    if ".attention.query." in ours:
        return config.num_attention_heads
    return config.key_value_heads if ".attention.key." in ours else None


def gguf_settings(config: MegatronModelConfig) -> dict[str, Any]:
    """What a file says of the architecture: the arguments of ``GGUFWriter.add_NAME``."""
    settings: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        block_count=config.num_hidden_layers,
        feed_forward_length=config.ffn_size,
        head_count=config.num_attention_heads,
        head_count_kv=config.key_value_heads,
        key_length=config.head_size,
        value_length=config.head_size,
    )
    is_rms = config.normalization == "rmsnorm"
    settings["layer_norm_rms_eps" if is_rms else "layer_norm_eps"] = config.layernorm_eps
    if config.position_embedding == "rotary":
        settings |= dict(rope_dimension_count=config.rotary_dim, rope_freq_base=config.rotary_base)
    if config.num_experts is not None:
        settings |= dict(
            expert_count=config.num_experts,
            expert_used_count=config.num_experts_per_token,
            expert_feed_forward_length=config.expert_ffn_size,
        )
        if gguf_family(config) is _LLAMA:  # it knows one width, and has experts in every layer
            settings["feed_forward_length"] = config.expert_ffn_size
    return settings

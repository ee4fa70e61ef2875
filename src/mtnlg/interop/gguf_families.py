"""Which of llama.cpp's architectures computes which family of ours, and what its graph has built in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.interop.architectures import nearest_architecture

_PLAIN_EXPERTS: dict[str, Any] = dict(num_dense_layers_first=0, moe_layer_interval=1)


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp.

    Args:
        name: its ``general.architecture``.
        activations: those of ours that its graph computes.
        joins_queries: queries, keys and values are one tensor, ``attn_qkv``.
        joins_gate: gate and up are one tensor, ``ffn_up``.
        turns_pairs: rotary positions turn neighbouring rows of a head, where ours turn its two halves.
        needs_head: there is a tensor for the head also where it is the embedding.
        has_windows: its graph has layers that see only so many tokens back.
        scalings: ways to scale rotary positions that it computes.
        fixed: our field → what it must be.
        head_is_share: a head is ``hidden_size / num_attention_heads`` wide.
        norm_less_one: norms are stored less one in ours, and whole in its files.
    """

    name: str
    activations: tuple[str, ...] = ("swiglu",)
    joins_queries: bool = False
    joins_gate: bool = False
    turns_pairs: bool = False
    needs_head: bool = False
    has_windows: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    fixed: dict[str, Any] = field(default_factory=dict)
    head_is_share: bool = False
    norm_less_one: bool = False


_LLAMA = GgufFamily("llama", turns_pairs=True, scalings=("linear", "yarn", "llama3", "longrope"))
_GEMMA = GgufFamily(
    "gemma", ("geglu_tanh",), scalings=("linear",), fixed=dict(tie_word_embeddings=True), norm_less_one=True
)
_GELU = ("gelu_tanh", "gelu")
_T5 = GgufFamily("t5", ("relu", "geglu_tanh"), fixed=dict(relative_attention_max_distance=128))
# By Hugging Face's name; of those that share an architecture the last is what files are read as.
FAMILIES = {
    "gpt2": GgufFamily("gpt2", _GELU, joins_queries=True, head_is_share=True),
    "mistral": _LLAMA,
    "llama": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", head_is_share=True),
    "qwen2_moe": GgufFamily(
        "qwen2moe",
        needs_head=True,
        head_is_share=True,
        fixed=dict(normalize_router_weights=False, **_PLAIN_EXPERTS),
    ),
    "qwen3": GgufFamily("qwen3", fixed=dict(attention_bias=False)),
    "qwen3_moe": GgufFamily(
        "qwen3moe", fixed=dict(attention_bias=False, normalize_router_weights=True, **_PLAIN_EXPERTS)
    ),
    "glm4_moe": GgufFamily("glm4moe", scalings=(), fixed=dict(moe_layer_interval=1)),
    "phi3": GgufFamily(
        "phi3", joins_queries=True, joins_gate=True, scalings=("longrope",), head_is_share=True
    ),
    "gpt_neox": GgufFamily(
        "gptneox",
        _GELU,
        joins_queries=True,
        needs_head=True,
        fixed=dict(attention_bias=True),
        head_is_share=True,
    ),
    "bloom": GgufFamily("bloom", ("gelu_tanh",), joins_queries=True, head_is_share=True),
    "gemma": _GEMMA,
    "gemma2": GgufFamily(
        "gemma2",
        ("geglu_tanh",),
        has_windows=True,
        scalings=("linear",),
        fixed=dict(tie_word_embeddings=True),
        norm_less_one=True,
    ),
    "gemma3_text": GgufFamily(
        "gemma3", ("geglu_tanh",), has_windows=True, scalings=("linear",), norm_less_one=True
    ),
    "umt5": _T5,
    "mt5": _T5,
    "t5": _T5,
}
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # so many layers are told from others by llama.cpp


def gguf_family(config: MegatronModelConfig) -> GgufFamily:
    """What llama.cpp runs ``config`` as.

    Raises:
        ConfigError: it has nothing that computes this model; every field in the way is named.
    """
    model_type = nearest_architecture(config).model_type
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"GGUF: models of the family {model_type} cannot be written, for llama.cpp has no architecture "
            f"that computes them; it has for {', '.join(FAMILIES)}."
        )
    problems = [
        f"{name} is {getattr(config, name)!r}: it must be {value!r}."
        for name, value in family.fixed.items()
        if getattr(config, name) != value
    ]
    if config.activation_function not in family.activations:
        problems.append(
            f"activation_function is {config.activation_function!r}: llama.cpp computes "
            f"{family.name} with {' or '.join(family.activations)} only."
        )
    if family.head_is_share and config.head_size * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim is {config.head_size}: it must be hidden_size / num_attention_heads.")
    problems += _scaling_problems(family, config) + _gemma_problems(family, config)
    if problems:
        raise ConfigError(problems if len(problems) > 1 else f"GGUF: {problems[0]}")
    return family


def _scaling_problems(family: GgufFamily, config: MegatronModelConfig) -> list[str]:
    scaling = config.rotary_scaling or {}
    kind = scaling.get("rope_type")
    if kind is not None and kind not in family.scalings:
        kinds = " or ".join(family.scalings) or "None"
        return [f"rotary_scaling is {kind!r} in a {family.name}: it must be {kinds}."]
    if kind != "yarn":
        return []
    built_in = dict(beta_fast=32, beta_slow=1, truncate=True)
    return [
        f"rotary_scaling has {name} {scaling[name]!r}: llama.cpp computes {family.name} with {value} only."
        for name, value in built_in.items()
        if scaling.get(name) not in (None, value)
    ]


def _gemma_problems(family: GgufFamily, config: MegatronModelConfig) -> list[str]:
    if not family.norm_less_one:
        return []
    problems = []
    if config.attention_bias or config.has_attention_output_bias:
        problems.append("attention_bias is True: it must be False.")
    if family.name == "gemma2":
        problems += [
            f"{name} is None: llama.cpp always has it in a gemma2."
            for name in ("logit_softcap", "attention_softcap")
            if getattr(config, name) is None
        ]
    expected = gemma_attention_scalar(family, config)
    if (config.attention_scalar or config.head_size) != expected:
        problems.append(f"attention_scalar is {config.attention_scalar}: it must be {expected}.")
    return problems


def gemma_attention_scalar(family: GgufFamily, config: MegatronModelConfig) -> float:
    """What llama.cpp divides attention's scores by the square root of."""
    if _GEMMA_27B.get(family.name) == config.num_hidden_layers:
        return config.hidden_size // config.num_attention_heads
    return config.head_size

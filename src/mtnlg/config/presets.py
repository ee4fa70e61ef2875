"""Architectures by name, from one million parameters to a trillion.

Figures: GPT-2 (Radford et al. 2019), GPT-3 (arXiv 2005.14165, table 2.1, with Megatron's padded
vocabulary), Megatron-LM (arXiv 2104.04473, table 1), MT-NLG (arXiv 2201.11990, section 2), Llama 2
(arXiv 2307.09288), Llama 3 (arXiv 2407.21783), Qwen2.5 (arXiv 2412.15115), Mixtral (arXiv 2401.04088),
Qwen3 (arXiv 2505.09388), T5 (arXiv 1910.10683), mT5 (arXiv 2010.11934). The ``tiny``
sizes are ours, for laptops.
"""

from __future__ import annotations

import difflib
from typing import Any

from mtnlg.config.errors import ConfigError

MEGATRON_VOCAB_SIZE = 51200  # GPT-2's 50,257 padded to a multiple of 128 * 8 ranks


def _gpt(layers: int, hidden: int, heads: int, **fields: Any) -> dict[str, Any]:
    return dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, **fields)


def _megatron(layers: int, hidden: int, heads: int, **fields: Any) -> dict[str, Any]:
    shape = dict(
        vocab_size=MEGATRON_VOCAB_SIZE,
        max_position_embeddings=2048,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return _gpt(layers, hidden, heads, **{**shape, **fields})


def _llama(
    layers: int, hidden: int, heads: int, key_value_heads: int, ffn: int, vocab: int, **fields: Any
) -> dict[str, Any]:
    family = dict(
        vocab_size=vocab,
        num_key_value_heads=key_value_heads,
        intermediate_size=ffn,
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )
    return _gpt(layers, hidden, heads, **{**family, **fields})


def _t5(layers: int, hidden: int, heads: int, ffn: int, vocab: int, **fields: Any) -> dict[str, Any]:
    family = dict(
        architecture="encoder_decoder",
        vocab_size=vocab,
        intermediate_size=ffn,
        head_dim=64,
        position_embedding="relative",
        normalization="rmsnorm",
        layernorm_eps=1e-6,
        activation_function="geglu_tanh",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return _gpt(layers, hidden, heads, **{**family, **fields})


def _tiny(layers: int, hidden: int, heads: int, key_value_heads: int, ffn: int) -> dict[str, Any]:
    return _llama(
        layers, hidden, heads, key_value_heads, ffn, 8192,
        tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip


_QWEN = dict(attention_bias=True, attention_output_bias=False, rotary_base=1e6, layernorm_eps=1e-6)
_MIXTRAL = dict(
    rotary_base=1e6, max_position_embeddings=32768, num_experts=8, router_aux_loss_coefficient=0.02
)
_QWEN3_MOE = dict(
    rotary_base=1e6,
    max_position_embeddings=40960,
    layernorm_eps=1e-6,
    head_dim=128,
    qk_normalization=True,
    num_experts=128,
    num_experts_per_token=8,
    moe_intermediate_size=768,
    router_aux_loss_coefficient=0.001,
)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-1m": _tiny(4, 96, 3, 3, 256),
    "tiny-5m": _tiny(6, 224, 7, 7, 608),
    "tiny-10m": _tiny(8, 288, 6, 3, 768),
    "tiny-30m": _tiny(10, 480, 8, 4, 1280),
    "gpt2": _gpt(12, 768, 12, activation_function="gelu_tanh"),
    "gpt2-medium": _gpt(24, 1024, 16, activation_function="gelu_tanh"),
    "gpt2-large": _gpt(36, 1280, 20, activation_function="gelu_tanh"),
    "gpt2-xl": _gpt(48, 1600, 25, activation_function="gelu_tanh"),
    "gpt3-125m": _megatron(12, 768, 12),
    "gpt3-350m": _megatron(24, 1024, 16),
    "gpt3-760m": _megatron(24, 1536, 16),
    "gpt3-1.3b": _megatron(24, 2048, 16),
    "gpt3-2.7b": _megatron(32, 2560, 32),
    "gpt3-6.7b": _megatron(32, 4096, 32),
    "gpt3-13b": _megatron(40, 5120, 40),
    "gpt3-175b": _megatron(96, 12288, 96, init_method_std=0.006),
    "megatron-1.7b": _megatron(24, 2304, 24),
    "megatron-3.6b": _megatron(30, 3072, 32),
    "megatron-7.5b": _megatron(36, 4096, 32),
    "megatron-18b": _megatron(40, 6144, 48),
    "megatron-39b": _megatron(48, 8192, 64),
    "megatron-76b": _megatron(60, 10240, 80),
    "megatron-145b": _megatron(80, 12288, 96),
    "megatron-310b": _megatron(96, 16384, 128),
    "mt-nlg-530b": _megatron(105, 20480, 128, init_method_std=None),
    "megatron-1t": _megatron(128, 25600, 160, init_method_std=None),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama2-70b": _llama(80, 8192, 64, 8, 28672, 32000),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128256, rotary_base=5e5, max_position_embeddings=8192),
    "llama3-70b": _llama(80, 8192, 64, 8, 28672, 128256, rotary_base=5e5, max_position_embeddings=8192),
    "qwen2.5-0.5b": _llama(
        24, 896, 14, 2, 4864, 151936, tie_word_embeddings=True, max_position_embeddings=32768, **_QWEN
    ),
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 18944, 152064, max_position_embeddings=131072, **_QWEN),
    "mixtral-8x7b": _llama(32, 4096, 32, 8, 14336, 32000, **_MIXTRAL),
    "qwen3-30b-a3b": _llama(48, 2048, 32, 4, 6144, 151936, **_QWEN3_MOE),
    "t5-small": _t5(6, 512, 8, 2048, 32128, activation_function="relu", tie_word_embeddings=True),
    "t5-base": _t5(12, 768, 12, 3072, 32128, activation_function="relu", tie_word_embeddings=True),
    "t5-v1.1-small": _t5(8, 512, 6, 1024, 32128),
    "t5-v1.1-base": _t5(12, 768, 12, 2048, 32128),
    "t5-v1.1-large": _t5(24, 1024, 16, 2816, 32128),
    "t5-v1.1-xl": _t5(24, 2048, 32, 5120, 32128),
    "t5-v1.1-xxl": _t5(24, 4096, 64, 10240, 32128),
    "mt5-small": _t5(8, 512, 6, 1024, 250112),
    "mt5-base": _t5(12, 768, 12, 2048, 250112),
    "mt5-xxl": _t5(24, 4096, 64, 10240, 250112),
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of the preset ``name``.

    Raises:
        ConfigError: it does not exist; the message suggests the nearest names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(PRESETS)}."
        raise ConfigError(f"model preset {name!r} does not exist: {hint}")
    return dict(PRESETS[name])

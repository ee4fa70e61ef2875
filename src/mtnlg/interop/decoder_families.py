"""Hugging Face families of decoders without experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtnlg.interop.architecture import (
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    LLAMA_SETTINGS,
    NO_BIASES,
    Architecture,
)
from mtnlg.interop.settings import (
    GATED_ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    Activation,
    EmbeddingDropout,
    OneBias,
    Phi3Rotary,
    PreNorm,
    Rotary,
    ScaledEmbedding,
    TwoRotaries,
    Values,
    Window,
)


def _all_but(fields: dict[str, str], *names: str) -> dict[str, str]:
    return {name: key for name, key in fields.items() if name not in names}


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
        vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_inner=None, n_positions=1024,
        layer_norm_epsilon=1e-5, initializer_range=0.02, resid_pdrop=0.1, attn_pdrop=0.1,
        tie_word_embeddings=True, use_cache=True, activation_function="gelu_new",
    ),
    unsupported=dict(
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
    fixed=dict(
        position_embedding="learned",
        normalization="layernorm",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    settings=(
        Activation("activation_function", PLAIN_ACTIVATIONS),
        EmbeddingDropout("embd_pdrop", "resid_pdrop"),
    ),
)  # fmt: skip
_LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    LLAMA_FIELDS | dict(attention_bias="attention_bias", mlp_bias="mlp_bias"),
    LLAMA_DEFAULTS,
    {},
    LLAMA_FIXED | dict(attention_output_bias=None),
    LLAMA_SETTINGS,
)
_MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    LLAMA_FIELDS,
    LLAMA_DEFAULTS
    | dict(
        num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072, sliding_window=4096
    ),
    {},
    LLAMA_FIXED | NO_BIASES,
    (*LLAMA_SETTINGS, Window()),
)


def _from_layer_on(layer: int, values: Values) -> bool:
    return layer < values.get("max_window_layers", 28)


_QWEN_DEFAULTS = LLAMA_DEFAULTS | dict(
    vocab_size=151936, num_key_value_heads=32, intermediate_size=22016, max_position_embeddings=32768,
    sliding_window=4096,
)  # fmt: skip
_QWEN_SETTINGS = (*LLAMA_SETTINGS, Window(_from_layer_on, has_layers=True, has_switch=True))
_QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA_FIELDS,
    _QWEN_DEFAULTS,
    {},
    LLAMA_FIXED | dict(attention_bias=True, attention_output_bias=False, mlp_bias=False),
    _QWEN_SETTINGS,
)
_QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA_FIELDS | dict(attention_bias="attention_bias"),
    _QWEN_DEFAULTS | dict(head_dim=128),
    {},
    LLAMA_FIXED | dict(attention_output_bias=None, mlp_bias=False, qk_normalization=True),
    _QWEN_SETTINGS,
)
_PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    LLAMA_FIELDS | dict(hidden_dropout="resid_pdrop"),
    LLAMA_DEFAULTS
    | dict(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096,
        rms_norm_eps=1e-5, resid_pdrop=0.0, sliding_window=None,
    ),
    {},
    LLAMA_FIXED | NO_BIASES,
    (
        Activation("hidden_act", GATED_ACTIVATIONS),
        Phi3Rotary(kinds=("longrope",), is_partial=True),
        EmbeddingDropout("embd_pdrop", "resid_pdrop"),
        Window(),
    ),
)  # fmt: skip
_GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _all_but(LLAMA_FIELDS, "num_key_value_heads", "head_dim")
    | dict(
        layernorm_eps="layer_norm_eps",
        hidden_dropout="hidden_dropout",
        parallel_residual="use_parallel_residual",
        attention_bias="attention_bias",
    ),
    LLAMA_DEFAULTS
    | dict(
        vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
        intermediate_size=24576, layer_norm_eps=1e-5, hidden_act="gelu", hidden_dropout=0.0,
        use_parallel_residual=True, attention_bias=True,
    ),
    {},
    dict(
        position_embedding="rotary", normalization="layernorm", attention_output_bias=None, mlp_bias=True
    ),
    (
        Activation("hidden_act", PLAIN_ACTIVATIONS),
        Rotary(percent=0.25, is_partial=True, keys=("rotary_emb_base", "rotary_pct")),
    ),
)  # fmt: skip
_OPT = Architecture(
    "opt",
    "OPTForCausalLM",
    _all_but(LLAMA_FIELDS, "num_key_value_heads", "head_dim", "layernorm_eps")
    | dict(
        intermediate_size="ffn_dim",
        init_method_std="init_std",
        hidden_dropout="dropout",
        embedding_size="word_embed_proj_dim",
    ),
    LLAMA_DEFAULTS
    | dict(
        vocab_size=50272, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072,
        init_std=0.02, dropout=0.1, word_embed_proj_dim=None, activation_function="relu",
        enable_bias=True, do_layer_norm_before=True, tie_word_embeddings=True,
    ),
    dict(_remove_final_layer_norm=(False,), layer_norm_elementwise_affine=(True,), layerdrop=(0, 0.0)),
    dict(position_embedding="learned", position_offset=2, normalization="layernorm", layernorm_eps=1e-5),
    (
        Activation("activation_function", PLAIN_ACTIVATIONS),
        OneBias("enable_bias"),
        PreNorm("do_layer_norm_before"),
    ),
)  # fmt: skip
_BLOOM = Architecture(
    "bloom",
    "BloomForCausalLM",
    dict(
        vocab_size="vocab_size",
        hidden_size="hidden_size",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="seq_length",
        layernorm_eps="layer_norm_epsilon",
        init_method_std="initializer_range",
        hidden_dropout="hidden_dropout",
        attention_dropout="attention_dropout",
        tie_word_embeddings="tie_word_embeddings",
        use_cache="use_cache",
    ),
    dict(
        vocab_size=250880, hidden_size=64, n_layer=2, n_head=8, seq_length=2048, layer_norm_epsilon=1e-5,
        initializer_range=0.02, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=True,
        use_cache=True,
    ),
    dict(apply_residual_connection_post_layernorm=(False,), slow_but_exact=(False,)),
    dict(
        position_embedding="alibi",
        normalization="layernorm",
        embedding_norm=True,
        activation_function="gelu_tanh",
        intermediate_size=None,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    aliases=dict(n_embed="hidden_size", num_hidden_layers="n_layer", num_attention_heads="n_head"),
)  # fmt: skip
_GEMMA_DEFAULTS: dict[str, Any] = LLAMA_DEFAULTS | dict(
    vocab_size=256000, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True
)
_GEMMA_FIXED = dict(position_embedding="rotary", normalization="rmsnorm_1p", mlp_bias=False)
_GEMMA_FIXED |= dict(attention_output_bias=None)
_GEMMA = Architecture(
    "gemma",
    "GemmaForCausalLM",
    LLAMA_FIELDS | dict(attention_bias="attention_bias"),
    _GEMMA_DEFAULTS
    | dict(
        hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, hidden_act="gelu_pytorch_tanh",
    ),
    dict(use_bidirectional_attention=(None, False)),
    _GEMMA_FIXED,
    (
        # Its first releases say "gelu" and mean the tanh form.
        Activation("hidden_act", GATED_ACTIVATIONS | dict(gelu="geglu_tanh")),
        Rotary(),
        ScaledEmbedding(),
    ),
)  # fmt: skip


def _every_second(layer: int, values: Values) -> bool:
    return (layer + 1) % 2 == 0


def _every_sixth(layer: int, values: Values) -> bool:
    return (layer + 1) % values.get("sliding_window_pattern", 6) == 0


_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    fields=_GEMMA.fields
    | dict(
        attention_scalar="query_pre_attn_scalar",
        logit_softcap="final_logit_softcapping",
        attention_softcap="attn_logit_softcapping",
    ),
    defaults=_GEMMA_DEFAULTS
    | dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
    ),
    fixed=_GEMMA_FIXED | dict(norm_placement="around"),
    settings=(
        Activation("hidden_activation", GATED_ACTIVATIONS),
        Rotary(),
        ScaledEmbedding(),
        Window(_every_second, has_layers=True),
    ),
)  # fmt: skip
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    fields=_all_but(_GEMMA2.fields, "attention_softcap"),  # its key is there and has no effect
    defaults=_GEMMA2.defaults
    | dict(vocab_size=262208, max_position_embeddings=131072, final_logit_softcapping=None),
    fixed=_GEMMA2.fixed | dict(qk_normalization=True),
    settings=(
        Activation("hidden_activation", GATED_ACTIVATIONS),
        TwoRotaries(base=1e6),
        ScaledEmbedding(),
        Window(_every_sixth, has_layers=True),
    ),
)
DECODER_FAMILIES = {
    family.model_type: family
    for family in (
        *(_GPT2, _LLAMA, _QWEN2, _QWEN3, _MISTRAL, _PHI3),
        *(_GPT_NEOX, _OPT, _BLOOM, _GEMMA, _GEMMA2, _GEMMA3),
    )
}

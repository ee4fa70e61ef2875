"""Small random models of every family that GGUF files hold, and what is known of them."""

from __future__ import annotations

from typing import Any

import torch
from tests.interop.test_hugging_face import LLAMA

from mtnlg.config import MegatronModelConfig
from mtnlg.interop import write_gguf
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder, initialize_weights

SIZES: dict[str, Any] = dict(
    vocab_size=340,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    init_method_std=0.15,
)
ENDS = dict(normalization="rmsnorm_1p", tie_word_embeddings=True, activation_function="geglu_tanh")
GEMMA = LLAMA | ENDS | dict(embedding_scale=8.0, head_dim=24)
GEMMA2 = GEMMA | dict(norm_placement="around", logit_softcap=30.0, attention_softcap=50.0, sliding_window=9)
GEMMA3 = GEMMA | dict(norm_placement="around", qk_normalization=True, sliding_window=9, rotary_base=1e6)
GEMMA3 |= dict(rotary_local_base=1e4)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * pair for pair in range(8)],
    long_factor=[1.5 + 0.9 * pair for pair in range(8)],
    original_max_position_embeddings=256,
)
PLAIN = dict(activation_function="gelu_tanh")
NEOX = PLAIN | dict(position_embedding="rotary", rotary_percent=0.5, tie_word_embeddings=False)
EXPERTS = dict(num_experts=4, moe_intermediate_size=64)
SHARED = dict(num_shared_experts=1, shared_expert_intermediate_size=80, shared_expert_gate=True)
QWEN = LLAMA | dict(attention_bias=True, attention_output_bias=False)
T5 = dict(
    architecture="encoder_decoder",
    position_embedding="relative",
    normalization="rmsnorm",
    attention_bias=False,
    mlp_bias=False,
    relative_attention_num_buckets=8,
    activation_function="relu",
    head_dim=20,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": PLAIN,
    "gpt2-untied": PLAIN | dict(tie_word_embeddings=False),
    "llama": LLAMA | dict(tie_word_embeddings=False),
    "llama-biases": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama-head-dim": LLAMA | dict(head_dim=24),
    "llama-3.1": LLAMA | dict(rotary_scaling=LLAMA3, head_dim=24),
    "llama-linear": LLAMA | dict(rotary_scaling=dict(rope_type="linear", factor=4.0)),
    "llama-yarn": LLAMA | dict(rotary_scaling=YARN | dict(attention_factor=1.2)),
    "llama-longrope": LLAMA | dict(rotary_scaling=LONGROPE, max_position_embeddings=512),
    "mistral-window": LLAMA | dict(sliding_window=64),
    "qwen2": QWEN,
    "qwen2-yarn": QWEN | dict(rotary_scaling=YARN),
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=32),
    "mixtral": LLAMA | EXPERTS | dict(tie_word_embeddings=False),
    "qwen3_moe": LLAMA | EXPERTS | dict(qk_normalization=True),
    "qwen2_moe": QWEN | EXPERTS | SHARED | dict(normalize_router_weights=False),
    "glm4_moe": LLAMA
    | EXPERTS
    | dict(
        num_shared_experts=1,
        num_dense_layers_first=1,
        rotary_percent=0.5,
        router_score_function="sigmoid",
        router_load_balancing="bias",
        router_scaling_factor=1.5,
        attention_bias=True,
        attention_output_bias=False,
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2 | dict(full_attention_layers=[1]),
    "gemma2-pattern": GEMMA2 | dict(full_attention_layers=[0, 2], attention_scalar=24.0),
    "gemma3": GEMMA3 | dict(full_attention_layers=[1]),
    "gemma3-local": GEMMA3 | dict(rotary_scaling=dict(rope_type="linear", factor=8.0)),
    "llama-3.1-released": LLAMA | dict(rotary_scaling=LLAMA3 | dict(original_max_position_embeddings=8192)),
    "phi3": LLAMA | dict(exported_as="phi3", rotary_percent=0.5),
    "phi3-longrope": LLAMA | dict(exported_as="phi3", rotary_scaling=LONGROPE, max_position_embeddings=512),
    "gpt_neox": NEOX | dict(parallel_residual=True),
    "gpt_neox-serial": NEOX | dict(rotary_percent=1.0, tie_word_embeddings=True),
    "bloom": PLAIN
    | dict(position_embedding="alibi", embedding_norm=True, num_attention_heads=6)
    | dict(hidden_size=96, intermediate_size=384),
    "t5": T5,
    "t5-gated": T5
    | dict(activation_function="geglu_tanh", tie_word_embeddings=False, num_decoder_layers=2),
    "umt5": T5 | dict(relative_attention_per_layer=True, scale_output=True, tie_word_embeddings=False),
}
# llama.cpp takes GELU from a table of float16.
BY_TABLE = ("gpt2", "gemma", "gpt_neox", "bloom", "t5-gated")
TEXTS = [
    "秋天的夜晚，星光闪烁。我们在山上看月亮，听风吹过松林。",
    'The value of x is 12345, isn\'t it? He said: "no".',
    "  def f(self):\n\treturn self.value_1 + 2\n\n",
    "Größe, naïve, Привет мир! 你好，world 2024年 🙂🎉",
]
IDS = [list(range(3, 23)), [7, 300, 41, 22, 11, 8, 9, *range(100, 108)]]


def model_of(**fields: Any) -> MegatronLmDecoder | MegatronEncoderDecoder:
    """Random weights, norms and biases too, else mixing them up shows nothing."""
    config = MegatronModelConfig(**{**SIZES, **fields})
    model = (MegatronEncoderDecoder if config.has_encoder else MegatronLmDecoder)(config)
    initialize_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer += torch.randn(buffer.shape, generator=generator)
    return model.eval()


def write(path, model, *args, **kwargs):
    state = model.state_dict()
    return write_gguf(
        path, model.config, lambda names: ((name, state[name]) for name in names), *args, **kwargs
    )


def continued(model, ids, count):
    """The logits after each of ``ids``, and the most likely tokens that follow them.

    An encoder-decoder reads ``ids``; its logits are those after the tokens that follow.
    """
    has_encoder = model.config.has_encoder
    written = [model.config.decoder_start_token_id] if has_encoder else list(ids)
    source = [torch.tensor([ids])] if has_encoder else []
    found = []
    with torch.no_grad():
        for _ in range(count):
            found.append(model(*source, torch.tensor([written])).logits[0])
            written.append(int(found[-1][-1].argmax()))
    return found[-1 if has_encoder else 0], written[-count:]

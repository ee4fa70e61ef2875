"""In how many bits each tensor of a GGUF file is: the mixtures that llama.cpp's users know by name."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.interop.gguf_families import gguf_family
from mtnlg.interop.gguf_header import gguf_library
from mtnlg.interop.gguf_tensors import GgufTensor
from mtnlg.interop.k_quants import BLOCK as K_BLOCK
from mtnlg.interop.k_quants import K_QUANTS, quantize_k

BLOCK = 32  # numbers of a row that share a scale, in formats without a K
_FLOATS = ("f32", "f16", "bf16")
_SIMPLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_MIXTURES = {  # most matrices
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q5_k_s": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_k_s": "Q4_K",
    "q3_k_m": "Q3_K",
    "q2_k": "Q2_K",
}
PRECISIONS = (*_FLOATS, *_SIMPLE, *_MIXTURES)
ALWAYS_FLOAT = ("position_embd.weight", "ffn_gate_inp.weight", "attn_rel_b.weight")
_READ_AND_HEAD = ("token_embd.weight", "output.weight")
_NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"(?:enc\.|dec\.)?blk\.(?P<layer>\d+)\.(?:cross_)?(?P<part>.+)\.weight")
_EXPERTS_OF_MIXTRAL = 8


def known_precision(name: str) -> str:
    """The name as :data:`PRECISIONS` has it.

    Raises:
        ConfigError: there is none of that name.
    """
    if name.lower() not in PRECISIONS:
        raise ConfigError(f"GGUF precision is {name!r}: choose one of {', '.join(PRECISIONS)}.")
    return name.lower()


def file_type(precision: str) -> Any:
    """What the file's header says of its precision, of ``gguf.LlamaFileType``."""
    name = "ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"
    return gguf_library().LlamaFileType[name]


def kind_of(tensor: GgufTensor, precision: str, config: MegatronModelConfig) -> Any:
    """How a tensor is stored, of ``gguf.GGMLQuantizationType``.

    Vectors, learned positions and routers are float32. In a mixture of K formats some matrices have more
    bits than the rest, by the rules of llama.cpp's own quantizer; those whose rows do not divide into
    blocks of 256 have the nearest format with blocks of 32, and others float16.
    """
    kinds = gguf_library().GGMLQuantizationType
    if len(tensor.shape) == 1 or tensor.name.endswith(ALWAYS_FLOAT):
        return kinds.F32
    if precision in _FLOATS:
        return kinds[precision.upper()]
    columns = tensor.shape[-1]
    if precision in _MIXTURES:
        name = _kind_in_mixture(tensor.name, precision, config)
        if tensor.name in _READ_AND_HEAD and name == "Q6_K" and columns % K_BLOCK:
            name = "Q8_0"
        if name in K_QUANTS and columns % K_BLOCK:
            name = _NARROW[name]
    else:
        name = "Q8_0" if tensor.name in _READ_AND_HEAD else precision.upper()
    return kinds[name] if columns % BLOCK == 0 else kinds.F16


def _kind_in_mixture(name: str, precision: str, config: MegatronModelConfig) -> str:
    usual = _MIXTURES[precision]
    is_shared = config.tie_word_embeddings and not gguf_family(config).needs_head
    if name == "output.weight" or (name == "token_embd.weight" and is_shared):
        return "Q6_K"
    match = _LAYER.fullmatch(name)
    if match is None:
        return usual
    layer, part = int(match["layer"]), match["part"]
    count = config.decoder_layers if name.startswith("dec.") else config.num_hidden_layers
    is_mixtral = config.num_experts == _EXPERTS_OF_MIXTRAL
    if part in ("attn_v", "attn_qkv"):
        groups = config.num_attention_heads // config.key_value_heads
        return "Q8_0" if is_mixtral else _kind_of_values(precision, layer, count, groups)
    if part == "attn_k" and is_mixtral:
        return "Q8_0"
    if part.startswith("ffn_down"):
        return _kind_of_down(precision, layer, count)
    if part == "attn_output":
        if is_mixtral:
            return "Q5_K" if usual in ("Q2_K", "Q3_K", "Q4_K") else usual
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(precision, usual)
    return usual


def _kind_of_values(precision: str, layer: int, count: int, groups: int) -> str:
    if precision == "q2_k":
        return "Q4_K" if groups >= 4 else "Q3_K"
    if precision == "q3_k_m":
        return "Q5_K" if layer < 2 else "Q4_K"
    if precision == "q4_k_s" and layer < 4:
        return "Q5_K"
    return _more_in_some_layers(precision, layer, count)


def _kind_of_down(precision: str, layer: int, count: int) -> str:
    if precision == "q2_k":
        return "Q3_K"
    if precision == "q3_k_m":
        return "Q5_K" if layer < count // 16 else "Q4_K"
    if precision == "q4_k_s" and layer < count // 8:
        return "Q5_K"
    return _more_in_some_layers(precision, layer, count)


def _more_in_some_layers(precision: str, layer: int, count: int) -> str:
    """The first eighth, the last, and every third between have six bits."""
    eighth = count // 8
    has_more = layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if precision in ("q4_k_m", "q5_k_m") and has_more else _MIXTURES[precision]


def to_kind(numbers: Tensor, kind: Any) -> Any:
    """The bytes of a float32 tensor, or its numbers where it stays one, as an array."""
    if kind.name in K_QUANTS:
        return quantize_k(numbers, kind.name).numpy()
    if kind.name == "F16":
        return numbers.to(torch.float16).numpy()
    return gguf_library().quants.quantize(numbers.numpy(), kind)

"""Reads GGUF: the architecture, the tokenizer, and weights of any precision as numbers again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.gguf_families import FAMILIES, GgufTensor, gguf_tensors
from mtnlg.interop.gguf_file import gguf_library
from mtnlg.interop.gguf_tokenizer import definition_of, settings_of
from mtnlg.interop.lazy_tensor import FileBytes, LazyTensor, lazy
from mtnlg.interop.named_tensors import NamedTensors
from mtnlg.tokens import Tokenizer

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SETTINGS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_epsilon": "layernorm_eps",
    "attention.layer_norm_rms_epsilon": "layernorm_eps",
    "rope.freq_base": "rotary_base",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_token",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def open_gguf(path: Path) -> tuple[NamedTensors, Tokenizer | None]:
    """The model and its tokenizer; no weights are read yet.

    Args:
        path: the file; one that is split over several is not read.

    Raises:
        CheckpointError: the file is damaged, or holds a model that we do not compute.
        ConfigError: ``gguf`` is not installed.
    """
    gguf = gguf_library()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a GGUF file ({error}).") from None
    config = _config(fields, stored, str(path))
    ours: dict[str, Tensor] = {}
    expected = gguf_tensors(config)
    problems = [f"tensor {tensor.name} is missing" for tensor in expected if tensor.name not in stored]
    extra = stored.keys() - {tensor.name for tensor in expected}
    problems += [f"tensor {name} belongs to no parameter" for name in sorted(extra)]
    if problems:
        raise CheckpointError(f"{path}: the weights do not fit: {'; '.join(problems[:8])}.")
    for tensor in expected:
        ours |= _parameters(path, tensor, stored[tensor.name])
    return NamedTensors(config, ours), _tokenizer(fields)


def _config(fields: dict[str, Any], stored: dict[str, Any], where: str) -> MegatronModelConfig:
    name = fields.get("general.architecture")
    known = {family.name: (theirs, family) for theirs, family in reversed(FAMILIES.items())}
    if name not in known:
        raise CheckpointError(
            f"{where}: general.architecture is {name!r}: only {', '.join(sorted(known))} can be read."
        )
    _, family = known[name]
    if fields.get(f"{name}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in stored:
        raise CheckpointError(f"{where}: rotary positions are scaled: only unscaled ones can be read.")
    found = {
        ours: _number(fields[f"{name}.{key}"])
        for key, ours in _SETTINGS.items()
        if f"{name}.{key}" in fields
    }
    is_gpt2 = name == "gpt2"
    if name == "llama" and "num_experts" in found:
        found["moe_intermediate_size"] = found["intermediate_size"]
    if found.get("head_dim", 0) * found["num_attention_heads"] == found["hidden_size"]:
        del found["head_dim"]
    try:
        return MegatronModelConfig(
            **found,
            vocab_size=int(stored["token_embd.weight"].shape[1]),
            position_embedding="learned" if is_gpt2 else "rotary",
            normalization="layernorm" if is_gpt2 else "rmsnorm",
            activation_function=family.activations[0],
            attention_bias="blk.0.attn_q.bias" in stored or "blk.0.attn_qkv.bias" in stored,
            attention_output_bias="blk.0.attn_output.bias" in stored,
            mlp_bias="blk.0.ffn_up.bias" in stored,
            qk_normalization="blk.0.attn_q_norm.weight" in stored,
            tie_word_embeddings="output.weight" not in stored,
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: its settings do not make a model: {error}") from None


def _number(value: Any) -> Any:
    """A setting as it was written: files keep float32 of it."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _parameters(path: Path, tensor: GgufTensor, stored: Any) -> dict[str, Tensor]:
    shape = tuple(int(size) for size in reversed(stored.shape))
    if shape != tensor.shape:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} has the shape {list(shape)}, expected {list(tensor.shape)}."
        )
    kind = stored.tensor_type.name
    if kind in _FLOATS:
        whole: LazyTensor = lazy(FileBytes(path, int(stored.data_offset)), shape, _FLOATS[kind])
    else:
        whole = lazy(Quantized(stored), shape, torch.float32)
    if tensor.heads is not None:
        pairs = whole.unflatten(0, (tensor.heads, -1, 2))  # [heads, pair, half, ...]
        return {tensor.ours[0]: pairs.transpose(1, 2).flatten(0, 2)}
    return dict(zip(tensor.ours, whole.chunk(len(tensor.ours))))


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits.

    Args:
        stored: the library's, mapped from the file.
    """

    stored: Any

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`. The whole is made into numbers."""
        quants = gguf_library().quants
        numbers = torch.from_numpy(quants.dequantize(self.stored.data, self.stored.tensor_type).copy())
        return numbers.float().reshape(-1).as_strided(view.shape, view.stride(), view.storage_offset())


def _tokenizer(fields: dict[str, Any]) -> Tokenizer | None:
    definition = definition_of(fields)
    return None if definition is None else Tokenizer(json.dumps(definition), settings_of(fields))

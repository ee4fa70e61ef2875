"""What ranks of Megatron's older layout hold, put together under the names of Megatron core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import LazyTensor
from mtnlg.interop.megatron_names import layer_part
from mtnlg.interop.torch_file import as_lazy

_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")  # whose inputs are divided over tensor ranks
_ROWS = ("linear_qkv.", "linear_fc1.", "word_embeddings.weight", "output_layer.weight")
_FUSED_NORM = "layer_norm_"


def join_ranks(states: Mapping[tuple[int, int], Any], options: Any, where: str) -> dict[str, Tensor]:
    """Tensors of all ranks together, by Megatron core's names, layers counted over the whole model.

    Args:
        states: what each (pipeline rank, tensor rank) saved.
        options: Megatron's.
        where: for messages.

    Raises:
        CheckpointError: a rank is missing, or its model is not Megatron's.
    """
    pipelines = sorted({pipeline for pipeline, _ in states})
    tensors = sorted({tensor for _, tensor in states})
    expected = int(getattr(options, "pipeline_model_parallel_size", len(pipelines)) or 1)
    width = int(getattr(options, "tensor_model_parallel_size", len(tensors)) or 1)
    wanted = {(pipeline, tensor) for pipeline in range(expected) for tensor in range(width)}
    if missing := wanted - set(states):
        pipeline, tensor = min(missing)
        raise CheckpointError(
            f"{where}: the file of tensor rank {tensor}, pipeline rank {pipeline} is missing."
        )
    is_gated = bool(getattr(options, "swiglu", False))
    found: dict[str, Tensor] = {}
    begin = 0
    for chunk, pipeline in _chunks(states, pipelines):
        parts = [dict(_flat(_model(states[pipeline, tensor], chunk, where))) for tensor in tensors]
        count = 0
        for name in parts[0]:
            layer, shifted = _shifted(name, begin)
            count = max(count, layer + 1)
            found.setdefault(shifted, join_parts(shifted, [part[name] for part in parts], is_gated))
        begin += count
    return found


def _chunks(states: Mapping[tuple[int, int], Any], pipelines: list[int]) -> Iterator[tuple[str, int]]:
    """The model's pieces in the order of their layers: interleaved ranks hold several, ``model0`` …"""
    first = states[pipelines[0], 0]
    names = [name for name in ("model", *(f"model{index}" for index in range(64))) if name in first]
    for name in names:
        for pipeline in pipelines:
            yield name, pipeline


def _model(state: Any, chunk: str, where: str) -> Mapping[str, Any]:
    model = state.get(chunk)
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{where}: there is no {chunk} in it.")
    return model


def _flat(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name of Megatron core, tensor) of everything; older files are nested."""
    for name, value in model.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}.")
        elif isinstance(value, Tensor) and (usual := usual_name(full)) is not None:
            yield usual, value if isinstance(value, LazyTensor) else as_lazy(value)


def usual_name(name: str) -> str | None:
    """Megatron core's name of a tensor; ``None`` for what is no weight, or a tied copy."""
    name = name.removeprefix("module.").removeprefix("language_model.")
    for old in ("encoder.", "transformer."):
        if name.startswith(old):
            name = "decoder." + name.removeprefix(old)
    if name.endswith(("_extra_state", "inv_freq")) or name.startswith("word_embeddings_for_head"):
        return None
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    head, layers, rest = name.partition("decoder.layers.")
    if head or not layers:
        return name
    index, _, part = rest.partition(".")
    return f"decoder.layers.{index}.{layer_part(part)}"


def _shifted(name: str, begin: int) -> tuple[int, str]:
    """(the layer's number in its stage or -1, the name with its number in the model)."""
    before, layers, rest = name.partition("decoder.layers.")
    if before or not layers:
        return -1, name
    index, _, part = rest.partition(".")
    return int(index), f"decoder.layers.{begin + int(index)}.{part}"


def join_parts(name: str, parts: list[Tensor], is_gated: bool) -> Tensor:
    """One tensor from what tensor-parallel ranks hold of it."""
    if len(parts) == 1 or _FUSED_NORM in name:
        return parts[0]
    if name.endswith(_COLUMNS):
        return torch.cat(parts, dim=1)
    if "linear_fc1." in name and is_gated:  # each rank has its rows of the gate and of the other
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[which] for which in (0, 1) for half in halves])
    return torch.cat(parts) if any(part in name for part in _ROWS) else parts[0]

"""Writes GGUF, llama.cpp's file format (docs/gguf.md of ggml), one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.progress import Progress, no_progress
from mtnlg.interop.gguf_families import (
    GgufTensor,
    gguf_family,
    gguf_settings,
    gguf_tensors,
    rotary_factors,
)
from mtnlg.interop.gguf_tokenizer import add_tokenizer
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

PRECISIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK = 32  # numbers of a row that share a scale
_ALWAYS_FLOAT = ("position_embd.weight", "ffn_gate_inp.weight")
_READ_AND_HEAD = ("token_embd.weight", "output.weight")

Stream = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]


def write_gguf(
    path: Path,
    config: MegatronModelConfig,
    stream: Stream,
    tokenizer: Tokenizer | None = None,
    precision: str = "f16",
    name: str = "mtnlg",
    progress: Progress = no_progress,
) -> Path:
    """Write a model as one GGUF file.

    Vectors, learned positions and routers stay float32. With 4 and 5 bits the embedding and the head
    have 8, as in llama.cpp's own files of such precision they have more than the rest. A matrix whose rows
    do not divide into blocks of 32 is kept in float16.

    Args:
        path: the file; replaced when the new one is whole.
        config: the architecture.
        stream: gives parameters by our names.
        tokenizer: goes along, with its chat template; without it only ids can be used.
        precision: of the matrices, one of :data:`PRECISIONS`.
        name: shown by programs that load it.
        progress: told of bytes.

    Raises:
        ConfigError: llama.cpp has nothing that computes this model, the precision is unknown, or ``gguf``
            is not installed.
        CheckpointError: weights are missing or not numbers, or the disk refused.
    """
    gguf = gguf_library()
    if precision not in PRECISIONS:
        raise ConfigError(f"GGUF precision is {precision!r}: choose one of {', '.join(PRECISIONS)}.")
    tensors = gguf_tensors(config)
    kinds = [_kind_of(tensor, precision) for tensor in tensors]
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, gguf_family(config).name)
        _write_header(writer, config, tokenizer, precision, name)
        for tensor, kind in zip(tensors, kinds):
            size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            nbytes = torch.Size(size).numel()
            writer.add_tensor_info(tensor.name, tensor.shape, _number_type(kind), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, config, tensors, kinds, stream, progress)
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: the file could not be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def gguf_library() -> Any:
    """The package that knows the format.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError('GGUF needs the package gguf: pip install "mtnlg[interop]".') from None
    return gguf


def _kind_of(tensor: GgufTensor, precision: str) -> GGMLQuantizationType:
    kinds = gguf_library().GGMLQuantizationType
    if len(tensor.shape) == 1 or tensor.name.endswith(_ALWAYS_FLOAT):
        return kinds.F32
    if precision in ("f32", "f16", "bf16"):
        return kinds[precision.upper()]
    if tensor.shape[-1] % BLOCK:
        return kinds.F16
    return kinds.Q8_0 if tensor.name in _READ_AND_HEAD else kinds[precision.upper()]


def _number_type(kind: GGMLQuantizationType) -> Any:
    """What the library asks for beside a shape in numbers; with bytes it would be a shape in bytes."""
    import numpy as np

    return np.float16 if kind.name == "F16" else np.float32


def _write_header(
    writer: GGUFWriter,
    config: MegatronModelConfig,
    tokenizer: Tokenizer | None,
    precision: str,
    name: str,
) -> None:
    gguf = gguf_library()
    writer.add_name(name)
    file_type = "ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for setting, value in gguf_settings(config).items():
        getattr(writer, f"add_{setting}")(value)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)


def _write_tensors(
    writer: GGUFWriter,
    config: MegatronModelConfig,
    tensors: list[GgufTensor],
    kinds: list[GGMLQuantizationType],
    stream: Stream,
    progress: Progress,
) -> None:
    gguf = gguf_library()
    total = 4 * sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    done = 0
    for tensor, kind in zip(tensors, kinds):
        found = dict(stream(tensor.ours))
        missing = [name for name in tensor.ours if name not in found]
        if missing:
            raise CheckpointError(f"weights are missing: {', '.join(missing)}.")
        ours = [found[name] for name in tensor.ours]
        numbers = to_gguf(tensor, ours) if ours else rotary_factors(config)
        quantized = gguf.quants.quantize(numbers.numpy(), kind)
        writer.write_tensor_data(quantized)
        done += numbers.nbytes
        progress("writing", done, total, "bytes")


def to_gguf(tensor: GgufTensor, ours: list[Tensor]) -> Tensor:
    """Our parameters as the tensor of the file, float32.

    Raises:
        CheckpointError: there are numbers that are none.
    """
    whole = torch.cat(ours) if len(ours) > 1 else ours[0]
    whole = whole.detach().float().contiguous()
    if not torch.isfinite(whole).all():
        raise CheckpointError(f"{', '.join(tensor.ours)}: the weights hold NaN or infinity.")
    if tensor.heads is not None:
        halves = whole.unflatten(0, (tensor.heads, 2, -1))  # [heads, half, pair, ...]
        whole = halves.transpose(1, 2).flatten(0, 2).contiguous()
    return whole

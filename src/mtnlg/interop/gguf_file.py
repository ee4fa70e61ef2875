"""Writes GGUF, llama.cpp's file format (docs/gguf.md of ggml), one tensor in memory at a time."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.progress import Progress, no_progress
from mtnlg.interop.gguf_families import gguf_family
from mtnlg.interop.gguf_header import gguf_library
from mtnlg.interop.gguf_precision import PRECISIONS, file_type, kind_of, known_precision, to_kind
from mtnlg.interop.gguf_settings import EXACT, OWN_CONFIG, gguf_settings
from mtnlg.interop.gguf_tensors import GgufTensor, gguf_tensors, rotary_factors
from mtnlg.interop.gguf_tokenizer import add_tokenizer
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

__all__ = ["PRECISIONS", "write_gguf"]

Stream = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
_Kinds = list[tuple[GgufTensor, "GGMLQuantizationType"]]


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
    have 8, as in llama.cpp's own files of such precision they have more than the rest; what mixtures with a
    K in their names do is said in :mod:`mtnlg.interop.gguf_precision`. A matrix whose rows do not divide
    into blocks of 32 is kept in float16.

    Args:
        path: the file; replaced when the new one is whole.
        config: the architecture.
        stream: gives parameters by our names.
        tokenizer: goes along, with its chat template; without it only ids can be used.
        precision: of the matrices, one of :data:`PRECISIONS` in capitals or not.
        name: shown by programs that load it.
        progress: told of bytes.

    Raises:
        ConfigError: llama.cpp has nothing that computes this model, the precision is unknown, or ``gguf``
            is not installed.
        CheckpointError: weights are missing or not numbers, or the disk refused.
    """
    gguf = gguf_library()
    precision = known_precision(precision)
    tensors = [(tensor, kind_of(tensor, precision, config)) for tensor in gguf_tensors(config)]
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, gguf_family(config).name)
        _write_header(writer, config, tokenizer, precision, name)
        if exact := _exact(tensors, stream):
            writer.add_string(EXACT, json.dumps(exact))
        for tensor, kind in tensors:
            size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            nbytes = torch.Size(size).numel()
            writer.add_tensor_info(tensor.name, tensor.shape, _number_type(kind), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, config, tensors, stream, progress)
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: the file could not be written ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


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
    writer.add_name(name)
    writer.add_file_type(file_type(precision))
    writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
    for setting, value in gguf_settings(config).items():
        _add(writer, f"{gguf_family(config).name}.{setting}", value)
    writer.add_string(OWN_CONFIG, json.dumps(config.to_dict()))
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def _exact(tensors: _Kinds, stream: Stream) -> dict[str, str]:
    """Vectors that would not come back bit for bit, in base64."""
    found = {}
    for tensor, _ in tensors:
        if tensor.may_round:
            ours = _parameters(tensor, stream)
            back = tensor.to_ours(tensor.to_theirs(ours))[tensor.ours[0]]
            if not torch.equal(back, ours[0].float()):
                numbers = ours[0].detach().float().contiguous().numpy().tobytes()
                found[tensor.name] = base64.b64encode(numbers).decode()
    return found


def _write_tensors(
    writer: GGUFWriter,
    config: MegatronModelConfig,
    tensors: _Kinds,
    stream: Stream,
    progress: Progress,
) -> None:
    total = 4 * sum(torch.Size(tensor.shape).numel() for tensor, _ in tensors)
    done = 0
    for tensor, kind in tensors:
        if tensor.ours:
            numbers = tensor.to_theirs(_parameters(tensor, stream))
        else:
            numbers = rotary_factors(config, tensor.name).float()
        writer.write_tensor_data(to_kind(numbers, kind))
        done += numbers.nbytes
        progress("writing", done, total, "bytes")


def _parameters(tensor: GgufTensor, stream: Stream) -> list[Tensor]:
    """Ours that a tensor holds.

    Raises:
        CheckpointError: some are missing, or hold numbers that are none.
    """
    found: Mapping[str, Tensor] = dict(stream(tensor.ours))
    missing = [name for name in tensor.ours if name not in found]
    if missing:
        raise CheckpointError(f"weights are missing: {', '.join(missing)}.")
    for name in tensor.ours:
        if not torch.isfinite(found[name]).all():
            raise CheckpointError(f"{name}: the weights hold NaN or infinity.")
    return [found[name] for name in tensor.ours]

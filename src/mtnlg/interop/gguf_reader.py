"""Reads GGUF: the architecture, the tokenizer, and weights of any precision as numbers again."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.gguf_header import GgufHeader, StoredTensor, gguf_library, read_header
from mtnlg.interop.gguf_precision import ALWAYS_FLOAT
from mtnlg.interop.gguf_settings import EXACT, config_of_gguf
from mtnlg.interop.gguf_tensors import ALL_FACTORS, GgufTensor, gguf_tensors
from mtnlg.interop.gguf_tokenizer_reader import tokenizer_of
from mtnlg.interop.lazy_tensor import FileBytes, LazyTensor, Source, lazy, read, read_bytes
from mtnlg.interop.named_tensors import NamedTensors
from mtnlg.tokens import Tokenizer

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_AT_ONCE = 2**22  # numbers that are made of few bits at a time


def open_gguf(path: Path) -> tuple[NamedTensors, Tokenizer | None]:
    """The model and its tokenizer; of the weights only some vectors are read yet.

    Args:
        path: the file, or one part of a file that is split, beside the others.

    Raises:
        CheckpointError: the file is damaged, or holds a model that we do not compute.
        ConfigError: ``gguf`` is not installed.
    """
    header = read_header(path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    config = config_of_gguf(
        header.fields, shapes, lambda name: read(_lazy(header.tensors[name])), str(path)
    )
    expected = _expected(config, header, path)
    exact, dtype = _exact(header), _dtype(header)
    ours: dict[str, Tensor] = {}
    for tensor in expected:
        stored = header.tensors[tensor.name]
        if not tensor.may_round:
            ours |= tensor.to_ours(_lazy(stored, torch.float32 if _stays_wide(tensor) else dtype))
        else:
            ours |= _computed(tensor, _lazy(stored), exact.get(tensor.name), dtype)
    return NamedTensors(config, ours), tokenizer_of(header.fields, config, str(path))


def _expected(config: MegatronModelConfig, header: GgufHeader, path: Path) -> list[GgufTensor]:
    """The tensors that hold parameters, all of which are there in their shapes, and no others."""
    expected = [tensor for tensor in gguf_tensors(config) if tensor.ours]
    stored = {name: tensor for name, tensor in header.tensors.items() if name not in ALL_FACTORS}
    problems = [f"tensor {tensor.name} is missing" for tensor in expected if tensor.name not in stored]
    extra = stored.keys() - {tensor.name for tensor in expected}
    problems += [f"tensor {name} belongs to no parameter" for name in sorted(extra)]
    problems += [
        f"tensor {tensor.name} has the shape {list(found.shape)}, expected {list(tensor.shape)}"
        for tensor in expected
        if (found := stored.get(tensor.name)) is not None and found.shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path}: the weights do not fit: {shown}.")
    copies = {"output.weight"} if config.tie_word_embeddings else set()
    return [tensor for tensor in expected if tensor.name not in copies]


def _dtype(header: GgufHeader) -> torch.dtype:
    """One for all parameters, for models compute in one: that of the matrices where they agree."""
    kinds = {
        tensor.kind.name
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1 and not name.endswith(ALWAYS_FLOAT)
    }
    return _FLOATS[kinds.pop()] if kinds in ({"F16"}, {"BF16"}) else torch.float32


def _stays_wide(tensor: GgufTensor) -> bool:
    """What balancing has moved in small steps."""
    return tensor.ours[0].endswith("selection_bias")


def _lazy(stored: StoredTensor, dtype: torch.dtype = torch.float32) -> LazyTensor:
    found = _FLOATS.get(stored.kind.name)
    source: Source = Quantized(stored) if found is None else FileBytes(stored.path, stored.start)
    found = found or torch.float32
    return lazy(source if found == dtype else Cast(source, stored.shape, found), stored.shape, dtype)


def _computed(
    tensor: GgufTensor, whole: LazyTensor, exact: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of a tensor that was computed with on its way: ours as it was, where the file says and means it."""

    def numbers() -> Tensor:
        found = read(whole)
        if exact is not None and torch.equal(tensor.to_theirs([exact]), found):
            return exact.to(dtype)
        return tensor.to_ours(found)[tensor.ours[0]].to(dtype)

    return {tensor.ours[0]: lazy(Computed(numbers), tensor.shape, dtype)}


def _exact(header: GgufHeader) -> dict[str, Tensor]:
    """Vectors whose last bits the file's own tensors lack, by their names there."""
    try:
        saved = json.loads(header.fields.get(EXACT, "{}"))
        raw = {name: bytearray(base64.b64decode(text)) for name, text in saved.items()}
        return {name: torch.frombuffer(numbers, dtype=torch.float32) for name, numbers in raw.items()}
    except (ValueError, binascii.Error, AttributeError):
        return {}  # not as we write it; the tensors are there


@dataclass(frozen=True)
class Cast:
    """A tensor in another type than its file has it in.

    Args:
        source: of the numbers.
        shape: of the whole.
        dtype: the file's.
    """

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`."""
        whole = torch.empty(self.shape, dtype=self.dtype, device="meta")
        there = whole.as_strided(view.shape, view.stride(), view.storage_offset())
        return self.source.read(there).to(view.dtype)


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed when it is wanted.

    Args:
        numbers: gives the whole.
    """

    numbers: Callable[[], Tensor]

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`."""
        whole = self.numbers().contiguous()
        return whole.reshape(-1).as_strided(view.shape, view.stride(), view.storage_offset())


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits.

    Args:
        stored: where it lies.
    """

    stored: StoredTensor

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`. Whole rows are made into numbers."""
        columns = self.stored.shape[-1]
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride()))
        offset = int(view.storage_offset())
        first, end = offset // columns, (offset + last) // columns + 1
        if not view.numel():
            return torch.empty(view.shape)
        rows = self._rows(first, end)
        return rows.reshape(-1).as_strided(view.shape, view.stride(), offset - first * columns)

    def _rows(self, first: int, end: int) -> Tensor:
        """[end - first, columns], float32."""
        import numpy as np

        gguf = gguf_library()
        columns = self.stored.shape[-1]
        block, size = gguf.GGML_QUANT_SIZES[self.stored.kind]
        row_bytes = columns // block * size
        found = torch.empty(end - first, columns)
        step = max(1, _AT_ONCE // columns)
        with self.stored.path.open("rb", buffering=0) as file:
            for row in range(first, end, step):
                count = min(step, end - row)
                codes = np.empty((count, row_bytes), np.uint8)
                read_bytes(file, self.stored.start + row * row_bytes, codes.reshape(-1).data)
                numbers = gguf.quants.dequantize(codes, self.stored.kind)
                found[row - first : row - first + count] = torch.from_numpy(numbers)
        return found

"""Tensors that stay in their files: views of them are views, and only what is read in the end is read.

``LazyTensor`` takes part in torch's own view operations (slices, transposes, chunks, reshapes of one).
:func:`read` then fetches exactly the numbers of the view, so a rank reads its slice of a matrix whatever
the rules are by which the file's tensor becomes ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtnlg.config import CheckpointError

_VIEWS = {
    getattr(torch.ops.aten, name)
    for name in (
        *("alias", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
        *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "unfold"),
    )
}
MANY_RUNS = 64  # above these, numbers of a view are not read run by run
_VIEW_METHODS = {"chunk", "permute", "split", "split_with_sizes", "t", "transpose", "unbind", "unsqueeze"}
_JOINS = {torch.ops.aten.cat: False, torch.ops.aten.stack: True}


class Source(Protocol):
    """Where the numbers of a whole tensor lie."""

    def read(self, view: Tensor) -> Tensor:
        """The numbers of ``view``, a view of a meta tensor that stands for the whole, contiguous one."""


class LazyTensor(Tensor):
    """A view of a tensor that has not been read. Anything but another view of it reads it."""

    source: Source
    meta: Tensor

    @staticmethod
    def __new__(cls, source: Source, meta: Tensor) -> LazyTensor:
        """A view of the tensor of ``source``.

        Args:
            source: where the numbers are.
            meta: a view of a contiguous meta tensor of the whole shape.
        """
        place = (meta.shape, meta.stride(), int(meta.storage_offset()))
        made: LazyTensor = Tensor._make_wrapper_subclass(
            cls, *place, dtype=meta.dtype, device=torch.device("cpu")
        )
        made.source, made.meta = source, meta
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The usual views, without torch's dispatcher, which would import its distributed tensors first."""
        is_view = getattr(function, "__name__", "") in _VIEW_METHODS
        if not is_view or not isinstance(args[0], LazyTensor):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            found = function(args[0].meta, *args[1:], **(kwargs or {}))
        if isinstance(found, Tensor):
            return cls(args[0].source, found)
        return [cls(args[0].source, part) for part in found]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = function.overloadpacket
        if packet in _VIEWS:
            of = args[0]
            found = function(of.meta, *args[1:], **(kwargs or {}))
            if isinstance(found, Tensor):
                return cls(of.source, found)
            return [cls(of.source, part) for part in found]
        if packet in _JOINS:
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            return join(args[0], dim, is_new=_JOINS[packet])
        args, kwargs = torch.utils._pytree.tree_map(read, (args, kwargs or {}))
        return function(*args, **kwargs)


def lazy(source: Source, shape: Sequence[int], dtype: torch.dtype) -> LazyTensor:
    """The whole tensor of ``source``."""
    return LazyTensor(source, torch.empty(tuple(shape), dtype=dtype, device="meta"))


def read(tensor: Any) -> Any:
    """The numbers of a lazy tensor, contiguous and in memory of their own; anything else as it is."""
    if not isinstance(tensor, LazyTensor):
        return tensor
    return tensor.source.read(tensor.meta).contiguous()


def join(parts: Sequence[Tensor], dim: int = 0, is_new: bool = False) -> Tensor:
    """Tensors, lazy or not, one after the other along ``dim``; with ``is_new`` along a new one."""
    parts = [part.unsqueeze(dim) for part in parts] if is_new else list(parts)
    dim = dim % parts[0].dim()
    places, end = [], 0
    for part in parts:
        places.append((tuple(end if axis == dim else 0 for axis in range(part.dim())), part))
        end += part.shape[dim]
    shape = [end if axis == dim else size for axis, size in enumerate(parts[0].shape)]
    return lazy(Parts(shape, places), shape, parts[0].dtype)


@dataclass(frozen=True)
class FileBytes:
    """A tensor whose numbers lie in a file one after the other.

    Args:
        path: the file.
        start: of the first number, bytes.
    """

    path: Path
    start: int

    def read(self, view: Tensor) -> Tensor:
        """See :class:`Source`. Of numbers that lie in many short runs, the system reads whole pages."""
        if view.numel() and _num_runs(view) > MANY_RUNS:
            return self._mapped(view).clone()
        return self._read_runs(view)

    def _mapped(self, view: Tensor) -> Tensor:
        """The view over the file's own memory."""
        last = sum((size - 1) * step for size, step in zip(view.shape, view.stride()))
        start = self.start + int(view.storage_offset()) * view.element_size()
        num_bytes = (last + 1) * view.element_size()
        if self.path.stat().st_size < start + num_bytes:
            raise CheckpointError(f"{self.path}: the file is cut short.")
        # Copied on write, so that torch may call it writable; nobody writes.
        memory = np.memmap(self.path, np.uint8, "c", start, (num_bytes,))
        return torch.from_numpy(memory).view(view.dtype).as_strided(view.shape, view.stride())

    def _read_runs(self, view: Tensor) -> Tensor:
        """Each run of neighbouring numbers is read by itself, and nothing else."""
        strides = view.stride()
        order = sorted(range(view.dim()), key=lambda axis: -strides[axis])
        sorted_view = view.permute(order)
        found = torch.empty(sorted_view.shape, dtype=view.dtype)
        if found.numel():
            inner = _contiguous_axes(sorted_view)
            runs = found.flatten(found.dim() - inner) if inner else found.unsqueeze(-1)
            size = view.element_size()
            with self.path.open("rb", buffering=0) as file:
                for place, offset in _runs(sorted_view, inner):
                    read_bytes(file, self.start + offset * size, memory_of(runs[place]))
        back = [order.index(axis) for axis in range(view.dim())]
        return found.permute(back)


def _num_runs(view: Tensor) -> int:
    """How many runs of neighbouring numbers a view consists of."""
    ordered = view.permute(sorted(range(view.dim()), key=lambda axis: -view.stride()[axis]))
    return math.prod(ordered.shape[: view.dim() - _contiguous_axes(ordered)])


def _contiguous_axes(view: Tensor) -> int:
    """How many of the last axes are one run of neighbouring numbers."""
    expected, count = 1, 0
    for size, stride in zip(reversed(view.shape), reversed(view.stride())):
        if size != 1 and stride != expected:
            break
        expected *= size
        count += 1
    return count


def _runs(view: Tensor, inner: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """The place of each run among the outer axes, and the number that it begins with."""
    outer = view.dim() - inner
    for place in itertools.product(*(range(size) for size in view.shape[:outer])):
        offset = sum(index * stride for index, stride in zip(place, view.stride()))
        yield place, int(view.storage_offset()) + offset


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_bytes(file: Any, start: int, target: memoryview) -> None:
    """Fill ``target`` from ``start`` on.

    Raises:
        CheckpointError: the file ends before.
    """
    file.seek(start)
    while target:
        count = file.readinto(target)
        if not count:
            raise CheckpointError(f"{file.name}: the file is cut short.")
        target = target[count:]


@dataclass(frozen=True)
class Parts:
    """A tensor of which parts lie in several places.

    Args:
        shape: of the whole.
        places: where each part begins in the whole, and the part.
    """

    shape: Sequence[int]
    places: Sequence[tuple[tuple[int, ...], Tensor]]

    def read(self, view: Tensor) -> Tensor:
        """See :class:`Source`.

        Raises:
            CheckpointError: some of the numbers are in no part.
        """
        strides = torch.empty(tuple(self.shape), device="meta").stride()
        axes = _axes_of(view, strides, self.shape)
        if axes is None:  # reshaped: no box of the whole
            return self._rows(view, strides[0])
        begins, sizes = _box_of(view, strides, axes)
        box = self._box(begins, sizes, view.dtype)
        kept = [axis for axis in range(len(self.shape)) if axis in axes]
        box = box.reshape([sizes[axis] for axis in kept])
        return box.permute([kept.index(axis) for axis in axes])

    def _rows(self, view: Tensor, stride: int) -> Tensor:
        """A view that is no box, by way of all rows of the whole that it has numbers of."""
        if not view.numel():
            return torch.empty(view.shape, dtype=view.dtype)
        last = sum((size - 1) * step for size, step in zip(view.shape, view.stride()))
        first_row = view.storage_offset() // stride
        end_row = (view.storage_offset() + last) // stride + 1
        sizes = [end_row - first_row, *self.shape[1:]]
        rows = self._box([first_row, *[0] * (len(sizes) - 1)], sizes, view.dtype)
        return rows.as_strided(view.shape, view.stride(), view.storage_offset() - first_row * stride)

    def _box(self, begins: list[int], sizes: list[int], dtype: torch.dtype) -> Tensor:
        found = torch.empty(sizes, dtype=dtype)
        covered = 0
        for offsets, part in self.places:
            common = [
                (max(begin, offset), min(begin + size, offset + length))
                for begin, size, offset, length in zip(begins, sizes, offsets, part.shape)
            ]
            if all(low < high for low, high in common):
                there = tuple(slice(low - o, high - o) for (low, high), o in zip(common, offsets))
                here = tuple(slice(low - b, high - b) for (low, high), b in zip(common, begins))
                found[here] = read(part[there])
                covered += math.prod(high - low for low, high in common)
        if covered < found.numel():
            raise CheckpointError("slices are missing.")
        return found


def _axes_of(view: Tensor, strides: tuple[int, ...], shape: Sequence[int]) -> list[int] | None:
    """Which axis of the whole each axis of ``view`` is; ``None`` where it is no box of the whole."""
    axes: list[int] = []
    for size, stride in zip(view.shape, view.stride()):
        alike = [axis for axis, other in enumerate(strides) if other == stride and axis not in axes]
        fitting = [axis for axis in alike if shape[axis] >= size]
        if not fitting:
            return None
        axes.append(max(fitting, key=lambda axis: shape[axis]))
    return axes


def _box_of(view: Tensor, strides: tuple[int, ...], axes: list[int]) -> tuple[list[int], list[int]]:
    begins, offset = [], view.storage_offset()
    for stride in strides:
        begins.append(offset // stride)
        offset %= stride
    sizes = [view.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(strides))]
    return begins, sizes


Cut = Callable[[str, Tensor], Tensor]
"""What of a parameter is wanted: a view of it."""


def cut_and_read(name: str, tensor: Tensor, cut: Cut | None) -> Tensor:
    """What ``cut`` leaves of ``tensor``, read."""
    return read(tensor if cut is None else cut(name, tensor))

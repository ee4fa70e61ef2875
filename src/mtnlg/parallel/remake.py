"""Results that are not kept for the backward pass, but made again there from what is kept.

``torch.utils.checkpoint`` forgets what a block keeps inside; the block's result is still kept by
whoever uses it. A norm or an activation function keeps next to nothing inside, and its result is as
large as its input: here the result is forgotten. Autograd saves a tensor through hooks; when the
tensor is a result that can be made again, the hooks save how instead (Megatron's
``recompute_modules`` does so for norms and activations, too).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class Kept(Protocol):
    """A tensor that is kept in another way than as it is."""

    def get(self) -> Tensor:
        """The tensor."""


Keep = Callable[[Tensor], "Tensor | Kept"]


def result_of(operator: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, which may be made again instead of being kept; see :func:`remaking`.

    Args:
        operator: what kind of result it is.
        function: gives the same result each time; not random.
        inputs: of it.
    """
    table = _current.table
    if table is None or operator not in table.operators:
        return function(*inputs)
    return table.call(function, inputs)


def is_remade(operator: str) -> bool:
    """Whether results of ``operator`` are to be made again at this moment."""
    return _current.table is not None and operator in _current.table.operators


@contextmanager
def remaking(operators: frozenset[str], keep: Keep | None = None) -> Iterator[None]:
    """While inside, the backward pass makes the results of these operators again.

    Args:
        operators: of the results that are not kept.
        keep: how to keep the other tensors; ``None`` keeps them as they are.
    """
    table = _Table(operators, keep)
    before, _current.table = _current.table, table
    try:
        with saved_tensors_hooks(table.pack, _unpack):
            yield
    finally:
        _current.table = before


@contextmanager
def keeping() -> Iterator[None]:
    """While inside, no result is made again (a block that is recomputed as a whole)."""
    before, _current.table = _current.table, None
    try:
        yield
    finally:
        _current.table = before


class _Current(threading.local):
    table: _Table | None = None  # what this thread is inside of


class _Result:
    """How to make one result, and the result itself between the first and the last use of it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function = function
        self.inputs = inputs
        self.uses = 0  # as often it was saved
        self._left = 0
        self._value: Tensor | None = None

    def get(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self.function(*map(_unpack, self.inputs))
            self._left = self.uses
        value = self._value
        self._left -= 1
        if self._left <= 0:
            self._value = None
        return value


@dataclass(frozen=True)
class _View:
    """A tensor in the memory of a result."""

    result: _Result
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        return self.result.get().as_strided(self.size, self.stride, self.offset)


class _Table:
    """The results made so far inside one context, by the memory they are in."""

    def __init__(self, operators: frozenset[str], keep: Keep | None) -> None:
        self.operators = operators
        self.keep = keep
        # A weak reference keeps the address from being given to other memory.
        self._results: dict[int, tuple[StorageWeakRef, _Result]] = {}

    def call(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        result = _Result(function, ())
        output = function(*inputs)
        result.inputs = tuple(
            self.pack(item.detach()) if isinstance(item, Tensor) else item for item in inputs
        )
        storage = output.untyped_storage()
        if all(not isinstance(i, Tensor) or i.untyped_storage()._cdata != storage._cdata for i in inputs):
            self._results[storage._cdata] = (StorageWeakRef(storage), result)
        return output

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return tensor  # a weight in parts, whose memory has no address of its own
        found = self._results.get(tensor.untyped_storage()._cdata)
        if found is None or found[0].expired():
            return tensor if self.keep is None else self.keep(tensor)
        result = found[1]
        result.uses += 1
        return _View(result, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Any) -> Any:
    return saved.get() if hasattr(saved, "get") else saved


_current = _Current()

"""Counts the bytes that a forward pass leaves behind for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationMeter(TorchDispatchMode):
    """While this context is open, every memory that an operation makes is noted.

    What is still alive afterwards is what autograd holds, the result included: each counted once,
    however many operations saved it. Memory that was there before (weights, inputs) is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, StorageWeakRef] = {}

    @property
    def bytes(self) -> int:
        """Bytes made in the context that are still alive."""
        return sum(size for reference, size in self._made.values() if not reference.expired())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        output = function(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage._cdata not in self._before:
                # The weak reference keeps the address from being given to other memory.
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return output


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for item in tree_leaves(tree):
        if isinstance(item, DTensor):
            item = item._local_tensor
        item = getattr(item, "elem", item)  # a collective that may still be under way
        if isinstance(item, Tensor):
            yield item.untyped_storage()

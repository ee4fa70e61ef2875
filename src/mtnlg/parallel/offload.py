"""What waits for the backward pass waits in the CPU's memory.

A tensor goes there while the layers after it compute, and comes back while the backward pass is in
the layer after its own: both on a stream of their own. Weights stay, and each memory travels once,
however many operations saved it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 2**16  # what is smaller is not worth a message


class Offload:
    """The activations of one stage's layers, in the CPU's memory.

    Args:
        device: where the layers run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: LayerMemory | None = None

    def of_layer(self, layer: nn.Module, is_first: bool) -> LayerMemory:
        """Where one forward pass of ``layer`` leaves its tensors.

        Args:
            layer: its weights stay on the device.
            is_first: whether it is the first of the stage.
        """
        weights = {p.untyped_storage()._cdata for p in layer.parameters() if type(p) is nn.Parameter}
        self._last = LayerMemory(self, weights, None if is_first else self._last)
        return self._last


class LayerMemory:
    """What one forward pass of one layer keeps.

    Args:
        offload: of the stage.
        weights: addresses of memory that stays.
        before: of the layer before, which the backward pass comes to next.
    """

    def __init__(self, offload: Offload, weights: set[int], before: LayerMemory | None) -> None:
        self.offload = offload
        self.before = before
        self._weights = weights
        self._copies: dict[int, tuple[StorageWeakRef, _Copy]] = {}

    def keep(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Send ``tensor`` to the CPU; use as ``keep`` of :func:`mtnlg.parallel.remake.remaking`."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights or storage.nbytes() < MIN_BYTES:
            return tensor
        found = self._copies.get(storage._cdata)
        if found is None or found[0].expired():
            found = StorageWeakRef(storage), _Copy(storage, self.offload)
            self._copies[storage._cdata] = found
        found[1].uses += 1
        return OffloadedTensor(found[1], tensor, self)

    def fetch(self) -> None:
        """Begin to bring everything back."""
        for _, copy in self._copies.values():
            copy.fetch()
        self._copies = {}


class OffloadedTensor:
    """One saved tensor: a view of a memory that is away."""

    def __init__(self, copy: _Copy, tensor: Tensor, layer: LayerMemory) -> None:
        self._copy = copy
        self._layer = layer
        self._dtype = tensor.dtype
        self._view = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        """The tensor, on its device again."""
        self._layer.fetch()
        if self._layer.before is not None:
            self._layer.before.fetch()
            self._layer.before = None
        empty = torch.empty(0, dtype=self._dtype, device=self._layer.offload.device)
        return empty.set_(self._copy.get(), self._view[2], self._view[0], self._view[1])


class _Copy:
    """One memory, on the CPU until it is fetched; on the device until its last use."""

    def __init__(self, storage: torch.UntypedStorage, offload: Offload) -> None:
        self.uses = 0
        self._taken = 0
        self._offload = offload
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        here = torch.empty(0, dtype=torch.uint8, device=offload.device).set_(storage)
        stream = offload.stream
        self._away = torch.empty(here.shape, dtype=torch.uint8, pin_memory=stream is not None)
        if stream is None:
            self._away.copy_(here)
            return
        stream.wait_stream(torch.cuda.current_stream(offload.device))
        with torch.cuda.stream(stream):
            self._away.copy_(here, non_blocking=True)
        here.record_stream(stream)  # its memory is not given to others before the copy is done

    def fetch(self) -> None:
        if self._back is not None:
            return
        stream = self._offload.stream
        if stream is None:
            self._back = self._away.clone()
            return
        self._back = torch.empty(self._away.shape, dtype=torch.uint8, device=self._offload.device)
        stream.wait_stream(torch.cuda.current_stream(self._offload.device))
        with torch.cuda.stream(stream):
            self._back.copy_(self._away, non_blocking=True)
            self._arrived = stream.record_event()
        self._back.record_stream(stream)

    def get(self) -> torch.UntypedStorage:
        self.fetch()
        assert self._back is not None
        if self._arrived is not None:
            torch.cuda.current_stream(self._offload.device).wait_event(self._arrived)
        storage = self._back.untyped_storage()
        self._taken += 1
        if self._taken % self.uses == 0:
            self._back = None
        return storage

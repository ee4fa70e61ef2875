"""Flat buffers in which the gradients and the parts of many weights travel together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mtnlg.parallel.gradients import local_part

# torch 2.13 gave both new names.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(eq=False)
class BucketWeight:
    """One weight of the model.

    Args:
        weight: the model's parameter, whole (or this tensor-parallel rank's part of it).
        rows: of its first dimension.
        part_rows: rows that each replica steps; the last parts may hold fewer, or none.
        start: of its elements in a row of the bucket's buffer.
        master: what the optimizer steps: this replica's rows, float32.
        uses: stages that bring a gradient in each backward pass.
        passes: backward passes that have brought a gradient in this step.
        axis: the tensor-parallel axis over which its gradient is still to be summed.
    """

    weight: nn.Parameter
    rows: int
    part_rows: int
    start: int
    master: nn.Parameter
    uses: int = 1
    passes: int = 0
    axis: DeviceMesh | None = None

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return local_part(self.weight.detach()).numel() // max(1, self.rows)

    @property
    def width(self) -> int:
        """Elements of each replica's part."""
        return self.part_rows * self.row_size

    def parts_of(self, flat: Tensor) -> Iterator[tuple[int, Tensor, slice]]:
        """The parts that hold rows of the weight, their places in ``flat`` [parts, width], which rows."""
        for index in range(flat.shape[0]):
            first, last = index * self.part_rows, min(self.rows, (index + 1) * self.part_rows)
            if first < last:
                size = (last - first) * self.row_size
                yield index, flat[index, self.start : self.start + size], slice(first, last)


@dataclass(eq=False)
class Bucket:
    """Weights whose gradients, and later whose parts, travel together.

    Args:
        group: the replicas.
        index: this replica's part, of ``num_parts`` (1 where nothing is divided).
        device: of the model.
        width: elements of each part.
        buffer: gradients, float32 [parts, width].
        payload: what is being sent: gradients [parts, width], or weights in their own dtype.
        gradients: views of this replica's part, laid out as the masters.
    """

    group: dist.ProcessGroup
    index: int
    num_parts: int
    device: torch.device
    width: int = 0
    weights: list[BucketWeight] = field(default_factory=list)
    buffer: Tensor | None = None
    payload: Tensor | None = None
    work: dist.Work | None = None
    gradients: list[Tensor] = field(default_factory=list)

    def gradient_buffer(self) -> Tensor:
        """The buffer, made when it is first needed and kept."""
        if self.buffer is None:
            self.buffer = torch.zeros(self.num_parts, self.width, device=self.device)
        return self.buffer

    def fill(self, item: BucketWeight, gradient: Tensor) -> None:
        """Add the gradient of one backward pass of one weight."""
        rows = gradient.reshape(item.rows, -1)
        for _, place, where in item.parts_of(self.gradient_buffer()):
            source = rows[where].reshape(-1)
            # The first one is copied: what the last step left need not be cleared.
            place.add_(source) if item.passes else place.copy_(source)
        item.passes += 1

    def send_gradients(self, dtype: torch.dtype) -> None:
        """Begin to sum the gradients over the replicas."""
        buffer = self.gradient_buffer()
        for item in self.weights:
            for _, place, _ in item.parts_of(buffer):
                if not item.passes:
                    place.zero_()  # a weight without a gradient (an expert without tokens)
                elif item.axis is not None:
                    dist.all_reduce(place, group=item.axis.get_group())
        payload = buffer.to(dtype)
        if self.num_parts > 1 and dist.get_backend(self.group) != "gloo":
            part = payload[self.index]
            self.work = REDUCE_SCATTER(part, payload.view(-1), group=self.group, async_op=True)
        else:  # gloo's reduce-scatter is an all-reduce of a copy
            self.work = dist.all_reduce(payload, group=self.group, async_op=True)
        self.payload = payload

    def land_gradients(self) -> Tensor:
        """Wait for the sum of this replica's part, float32 [width]."""
        payload, buffer = self._arrived(), self.gradient_buffer()
        if payload is not buffer:
            buffer[self.index].copy_(payload[self.index])
        return buffer[self.index]

    def send_weights(self) -> None:
        """Begin to bring all parts of the weights together, in the dtype that they compute in."""
        dtype = local_part(self.weights[0].weight.detach()).dtype
        flat = torch.empty(self.num_parts, self.width, dtype=dtype, device=self.device)
        mine = flat[self.index]
        for item in self.weights:
            part = local_part(item.master.detach())
            mine[item.start : item.start + part.numel()].copy_(part.reshape(-1))
        self.work = ALL_GATHER(flat.view(-1), mine, group=self.group, async_op=True)
        self.payload = flat

    def land_weights(self, skips_own: bool) -> None:
        """Wait for the other replicas' parts and put them into the model.

        Args:
            skips_own: this replica's part is in the model's memory already.
        """
        flat = self._arrived()
        for item in self.weights:
            whole = local_part(item.weight.detach())
            for index, source, where in item.parts_of(flat):
                if index != self.index or not skips_own:
                    whole[where].copy_(source.view(whole[where].shape))

    def _arrived(self) -> Tensor:
        assert self.work is not None and self.payload is not None
        self.work.wait()
        payload, self.work, self.payload = self.payload, None, None
        return payload

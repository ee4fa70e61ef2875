"""What tensor-parallel ranks send each other: two exchanges a block, each the other's gradient.

Matrices split by output want whole inputs, and matrices split by input leave partial sums. Between
blocks activations are whole on every rank (Shoeybi et al. 2019, arXiv 1909.08053) or, with sequence
parallelism, split over the sequence (Korthikanti et al. 2022, arXiv 2205.05198):

=========  ===================  ==============  ===================  ==============
           sequence parallel                    without
---------  -----------------------------------  -----------------------------------
           forward              backward        forward              backward
=========  ===================  ==============  ===================  ==============
``enter``  gather               reduce-scatter  nothing              sum
``leave``  reduce-scatter       gather          sum                  nothing
=========  ===================  ==============  ===================  ==============
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate

SEQUENCE_DIM = 1


class TensorAxis:
    """The ranks that share each matrix, and how activations go into and out of the split matrices.

    Args:
        mesh: the tensor-parallel axis.
        splits_sequence: whether activations between blocks are split over the sequence.
    """

    def __init__(self, mesh: DeviceMesh, splits_sequence: bool) -> None:
        self.mesh = mesh
        self.splits_sequence = splits_sequence
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self.group = mesh.get_group().group_name  # compiled code can hold a name

    @property
    def stream_gradient(self) -> Placement:
        """How ranks hold the gradient of a weight that they all apply between blocks.

        Each has the share of its own positions, or, without sequence parallelism, the whole.
        """
        return Partial() if self.splits_sequence else Replicate()

    def enter(self, hidden: Tensor) -> Tensor:
        """[batch, sequence or its part, hidden] → [batch, sequence, hidden] on every rank.

        Each rank's gradient may be its share of a sum.
        """
        if self.splits_sequence:
            return _Gather.apply(hidden, self.group, self.size, SEQUENCE_DIM)
        return _SumGradients.apply(hidden, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Each rank's share of a sum [batch, sequence, hidden] → the sum, whole or its part."""
        if self.splits_sequence:
            return _ReduceScatter.apply(partial, self.group, self.size, SEQUENCE_DIM)
        return _Sum.apply(partial, self.group)

    def part_of_sequence(self, whole: Tensor) -> Tensor:
        """[batch, sequence] → what belongs to this rank's activations between blocks."""
        return whole.chunk(self.size, dim=SEQUENCE_DIM)[self.rank] if self.splits_sequence else whole


def all_gather(part: Tensor, group: str, size: int, dim: int) -> Tensor:
    """The parts of all ranks, put together along ``dim``."""
    # The operators behind torch.distributed's own calls, by which compiled layers send too.
    operators = torch.ops._c10d_functional
    if part.device.type == "cpu":
        parts = _swap(torch.cat([part] * size), group, size)
    else:
        parts = operators.wait_tensor(operators.all_gather_into_tensor(part.contiguous(), size, group))
    return parts if dim == 0 else torch.cat(parts.chunk(size), dim=dim)


def reduce_scatter(partial: Tensor, group: str, size: int, dim: int) -> Tensor:
    """This rank's part, along ``dim``, of the sum over all ranks."""
    operators = torch.ops._c10d_functional
    parts = partial.contiguous() if dim == 0 else torch.cat(partial.chunk(size, dim=dim))
    if partial.device.type == "cpu":
        return _swap(parts, group, size).unflatten(0, (size, -1)).sum(dim=0)
    return operators.wait_tensor(operators.reduce_scatter_tensor(parts, "sum", size, group))


def _swap(parts: Tensor, group: str, size: int) -> Tensor:
    """Send each rank its part of [size * rows, ...]; the parts received, by sender.

    gloo copies what it gathers or scatters several times over: sending each rank its part straight takes
    half the processor time of its gather, and a third of its reduce-scatter.
    """
    counts = [len(parts) // size] * size
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_to_all_single(parts, counts, counts, group))


def all_reduce(partial: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(partial.contiguous(), "sum", group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str, size: int, dim: int) -> Tensor:
        ctx.where = (group, size, dim)
        return all_gather(part, group, size, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(gradients[0], *ctx.where), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: str, size: int, dim: int) -> Tensor:
        ctx.where = (group, size, dim)
        return reduce_scatter(partial, group, size, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(gradients[0], *ctx.where), None, None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: str) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: str) -> Tensor:
        return all_reduce(partial, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None

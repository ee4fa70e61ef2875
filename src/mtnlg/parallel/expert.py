"""Expert parallelism: each rank holds some of a layer's experts, and tokens travel to theirs.

Of the ranks that run different tokens, ``expert_parallel_size`` share the experts between them (Lepikhin
et al. 2020, arXiv 2006.16668). Every rank routes its own tokens, sends each to the rank of its expert,
and gets the result back: two all-to-all exchanges forward and two backward, of as many rows as there
are and no more. With tensor parallelism each expert's matrices are split like an MLP's.

A rank's gradient of its experts is already that of the tokens of all ranks that share them: only the
copies of an expert, on the axes ``expert_copy`` and ``expert_part``, are left to be summed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Shard, distribute_tensor

from mtnlg.model import Experts, MegatronLmDecoder, MixtureOfExperts
from mtnlg.model.mlp import Mlp
from mtnlg.model.moe import grouped_product
from mtnlg.model.router import router_logits
from mtnlg.parallel.cpu_linear import onednn_linear
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.tensor import COLUMN, COPY, ROW, distribute, local_weight

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]

EXPERT_DIM, OUT_DIM, IN_DIM = range(3)  # of an expert's matrices


def mixtures(decoder: MegatronLmDecoder) -> dict[int, MixtureOfExperts]:
    """The mixtures of experts of ``decoder`` by the number of their layer."""
    blocks = {int(index): layer.mlp for index, layer in decoder.layers.items()}
    return {index: block for index, block in blocks.items() if isinstance(block, MixtureOfExperts)}


def divide_experts(decoder: MegatronLmDecoder, mesh: Mesh) -> None:
    """Divide every mixture of experts over the ranks that share experts, matrices and sequences."""
    for block in mixtures(decoder).values():
        product = kernel_product if mesh.device.type == "cuda" else grouped_product
        block.experts.grouped_product = product
        if mesh.tensor_size > 1:
            _split_matrices(block, mesh)
        if mesh.tensor_size > 1 or mesh.layout.expert_parallel_size > 1:
            _distribute_experts(block.experts, mesh)
            block.experts.grouped_product = partial(_product_of_part, product)
        if mesh.layout.expert_parallel_size > 1:
            block.run_experts = ExpertExchange(mesh.axis("expert").get_group())
        if mesh.context_size > 1:
            block.router.losses.sum_of_parts = partial(_sum, mesh.axis("context").get_group())
        # How many tokens go to each expert is known only when they do: nothing here for a compiler.
        block.forward = torch.compiler.disable(block.forward)  # type: ignore[method-assign]


def experts_axes(mesh: Mesh) -> DeviceMesh:
    """The axes over which an expert's matrices are copied and parted, under expert parallelism."""
    axes = ("expert_part",) if mesh.size("expert_copy") == 1 else ("expert_copy", "expert_part")
    return mesh.axis(*axes)


def part_experts(parameter: nn.Parameter, num_parts: int) -> Shard | None:
    """Along which dimension replicas part ``parameter``: ``None`` is the first, as for any other.

    There are often fewer experts on a rank than replicas: then their matrices are parted instead.
    """
    if parameter.dim() != 3:
        return None
    experts, rows = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape[:2]
    return Shard(OUT_DIM) if experts % num_parts and rows % num_parts == 0 else None


def kernel_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The grouped product in one kernel, where the GPU's takes the dtype and the sizes."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if rows.dtype != torch.bfloat16 or not aligned or not len(rows):
        return grouped_product(rows, weight, counts)
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


class ExpertExchange:
    """Takes the place of running all experts here: tokens go to the ranks of their experts and back.

    Args:
        group: the ranks that share the experts, in the order of the experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [rows, hidden] of this rank sorted by expert, ``counts`` [all experts] → [rows, hidden]"""
        sent = counts.view(self.group.size(), -1)  # [ranks, experts of each]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        sizes = torch.stack([sent.sum(dim=1), received.sum(dim=1)]).tolist()
        arrived = _AllToAll.apply(rows, *sizes, self.group)  # by sender, and of each by expert
        expert = torch.arange(received.shape[1], device=rows.device).repeat(len(received))
        order = expert.repeat_interleave(received.flatten()).argsort(stable=True)
        done = experts(arrived.index_select(0, order), received.sum(dim=0))
        back = torch.zeros_like(done).index_copy(0, order, done)
        return _AllToAll.apply(back, *reversed(sizes), self.group)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, ``sent`` and ``received`` of each; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = (sent, received, group)
        return _send_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.way
        return _send_rows(output_gradients[0], received, sent, group), None, None, None


def _send_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _distribute_experts(experts: Experts, mesh: Mesh) -> None:
    """Make the experts' parameters DTensors over the ranks that share experts and matrices."""
    tensor = mesh.tensor_size > 1
    first: tuple[Placement, ...] = ()
    if mesh.layout.expert_parallel_size == 1:
        axes = mesh.axis("tensor")
    else:
        axes = mesh.axis("expert", "expert_tensor") if tensor else mesh.axis("expert")
        first = (Shard(EXPERT_DIM),)
    for name, weight in list(experts.named_parameters()):
        columns: tuple[Placement, ...] = (Shard(IN_DIM if name == "down" else OUT_DIM),) if tensor else ()
        divided = distribute_tensor(weight, axes, [*first, *columns], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(divided))


def _product_of_part(product: GroupedProduct, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return product(rows, weight.to_local(), counts)


def _split_matrices(block: MixtureOfExperts, mesh: Mesh) -> None:
    """Tensor parallelism of a mixture: one exchange before it and one after it, as for an MLP.

    All ranks route all tokens alike; each has a share of the experts' outputs, and so a share of the
    gradients by what is sent into them and by the router's weights.
    """
    axis = TensorAxis(mesh.axis("tensor"), mesh.layout.sequence_parallel)
    distribute(block.router, axis, weight=COPY)
    block.router.logits_function = _logits_of_share
    block.router.losses.share = 1.0 / axis.size
    if block.shared is not None:
        _split_shared(block.shared, axis, mesh)
    if block.shared_gate is not None:
        gate = block.shared_gate
        distribute(gate, axis, weight=COPY)
        gate.forward = partial(_gate_of_share, gate)  # type: ignore[method-assign]
    block.forward = partial(_between_exchanges, axis, block.forward)  # type: ignore[method-assign]


def _split_shared(shared: Mlp, axis: TensorAxis, mesh: Mesh) -> None:
    product = onednn_linear if mesh.device.type == "cpu" else F.linear
    for linear in (shared.gate, shared.up, shared.down):
        if linear is not None:
            distribute(linear, axis, weight=ROW if linear is shared.down else COLUMN)
            linear.forward = partial(_linear_of_part, linear, product)  # type: ignore[method-assign]


def _between_exchanges(axis: TensorAxis, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return axis.leave(forward(axis.enter(hidden)))


def _logits_of_share(hidden: Tensor, weight: Tensor) -> Tensor:
    return router_logits(hidden, local_weight(weight, Partial()))


def _gate_of_share(gate: nn.Linear, hidden: Tensor) -> Tensor:
    return F.linear(hidden, local_weight(gate.weight, Partial()))  # weights a share of the shared experts


def _linear_of_part(linear: nn.Linear, product: Callable[..., Tensor], inputs: Tensor) -> Tensor:
    return product(inputs, local_weight(linear.weight), None)


def _sum(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    counts = counts.clone()
    dist.all_reduce(counts, group=group)
    return counts

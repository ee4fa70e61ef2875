"""Gradients after the backward passes: made whole over the ranks, measured, scaled.

torch's ``clip_grad_norm_`` refuses parameters of different meshes, and pipeline stages and tied
copies are beyond it anyway, so the norm is our own: every rank sums the squares of exactly those
elements that it is the first to hold, and one sum over all ranks gives the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mtnlg.parallel.mesh import Mesh


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def finish_partial_sums(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients that each tensor-parallel rank holds only its share of.

    A weight that all ranks hold but apply to different positions (a norm under sequence parallelism)
    gets a partial gradient on each; with FSDP this has already happened.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def sum_tied_copies(gradient: Tensor | None, mesh: Mesh) -> None:
    """Add up the gradients of a tied embedding's two copies, on the first and the last stage.

    Both ranks add the same two numbers, so the copies stay bit-equal under any optimizer.
    """
    if gradient is not None and mesh.ends_group is not None:
        part = local_part(gradient)
        there = part.to(mesh.device)  # offloaded gradients are in the CPU's memory
        dist.all_reduce(there, group=mesh.ends_group)
        if there is not part:
            part.copy_(there)


def gradient_norm(
    parameters: Mapping[str, nn.Parameter], mesh: Mesh, counted_elsewhere: str = ""
) -> Tensor:
    """Euclidean norm of all gradients of the whole model.

    Args:
        parameters: this rank's parameters by name.
        mesh: the layout.
        counted_elsewhere: name of a parameter that another stage counts (a tied copy).

    Returns:
        A float32 scalar, the same on every rank.
    """
    squares = [
        torch.linalg.vector_norm(local_part(parameter.grad), dtype=torch.float32)
        for name, parameter in parameters.items()
        if parameter.grad is not None and name != counted_elsewhere and _is_first_holder(parameter, mesh)
    ]
    total = torch.stack(squares).square().sum() if squares else torch.zeros((), device=mesh.device)
    return mesh.sum_over_ranks(total.to(mesh.device)).sqrt()


def _is_first_holder(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether no rank before this one in the same stage holds the same elements."""
    if not isinstance(parameter, DTensor):
        return mesh.tensor_rank == 0 and mesh.context_rank == 0 and mesh.replica == 0
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    return all(
        not isinstance(placement, Replicate) or coordinate == 0
        for placement, coordinate in zip(parameter.placements, coordinates)
    )


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiply every gradient by ``factor``, in place."""
    gradients = [local_part(item.grad) for item in parameters if item.grad is not None]
    if not gradients:
        return
    if isinstance(factor, Tensor):
        factor = factor.to(gradients[0].device)
    torch._foreach_mul_(gradients, factor)

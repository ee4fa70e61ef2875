"""Names, slices and first values of a laid-out model's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtnlg.config import MegatronModelConfig
from mtnlg.model import initial_expert, initial_value
from mtnlg.parallel.stage import PREFIX, Stage
from mtnlg.parallel.working_copy import like

TIED_COPY = "head.output.weight"
TIED_ORIGINAL = "embedding.tokens.weight"


def canonical_name(name: str) -> str:
    """The plain model's name of a parameter of a :class:`~mtnlg.parallel.stage.Stage`."""
    return name.removeprefix(PREFIX)


def share_ends(stages: Sequence[Stage]) -> None:
    """Make the head of the last of one rank's ``stages`` use the embedding's matrix of the first."""
    embedding, head = stages[0].decoder.embedding, stages[-1].decoder.head
    assert embedding is not None and head is not None
    head.output.weight = embedding.tokens.weight


def local_slice(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of ``parameter``.

    Tensor parallelism (the last axis of the mesh) divides first and FSDP divides what it left, so
    axes are applied from the last to the first. Parts are those of ``torch.chunk``: the last ranks
    may hold less, or nothing.
    """
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    part = whole
    for axis in reversed(range(mesh.ndim)):
        placement = parameter.placements[axis]
        # FSDP's strided shard is a placement of its own beside Shard; both have ``dim``.
        dim = getattr(placement, "dim", None) if not placement.is_replicate() else None
        if dim is not None:
            part = _chunk(part, mesh.size(axis), dim, mesh.get_local_rank(axis))
    return part


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of ``tensor``, put together from its ranks where they can reach each other; all must call."""
    if not isinstance(tensor, DTensor):
        return tensor
    part = tensor.to_local()
    if part.device.type != tensor.device_mesh.device_type:  # offloaded to the CPU's memory
        moved = like(tensor, part.to(tensor.device_mesh.device_type))
        assert isinstance(moved, DTensor)
        tensor = moved
    return tensor.full_tensor()


def _chunk(tensor: Tensor, parts: int, dim: int, index: int) -> Tensor:
    chunks = tensor.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


@torch.no_grad()
def initialize(stage: nn.Module, config: MegatronModelConfig, seed: int) -> None:
    """Fill this rank's part of every parameter with the numbers that one process would draw.

    Whole parameters are made one at a time, so the peak is the largest of them; of experts, only those
    that this rank holds.
    """
    for name, parameter in stage.named_parameters():
        name = canonical_name(name)
        if config.tie_word_embeddings and name == TIED_COPY:
            name = TIED_ORIGINAL
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() == 3:
            _initialize_experts(name, parameter, target, config, seed)
        else:
            whole = initial_value(name, parameter.shape, config, seed)
            target.copy_(local_slice(whole, parameter))
    for buffer in stage.buffers():  # the routers' biases
        buffer.zero_()


def _initialize_experts(
    name: str, parameter: Tensor, target: Tensor, config: MegatronModelConfig, seed: int
) -> None:
    """Fill ``target``, this rank's part of [experts, out, in], one expert at a time."""
    if target.numel() == 0:
        return
    places = []  # in the whole parameter, along each dimension
    for dim, size in enumerate(parameter.shape):
        numbers = torch.arange(size).view([-1 if other == dim else 1 for other in range(3)])
        mine = local_slice(numbers.expand(parameter.shape), parameter)
        places.append(mine.movedim(dim, 0)[:, 0, 0])
    experts, rows, columns = places
    for part, expert in zip(target, experts.tolist()):
        whole = initial_expert(name, expert, parameter.shape[1:], config, seed)
        part.copy_(whole[rows][:, columns])

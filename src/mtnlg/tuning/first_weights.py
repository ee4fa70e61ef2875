"""A base's weights into a laid-out model: each rank takes what it holds of one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mtnlg.config import CheckpointError
from mtnlg.parallel.model import ParallelModel
from mtnlg.parallel.quantized import set_whole_matrix
from mtnlg.parallel.weights import local_slice
from mtnlg.quantization import quantized_linears
from mtnlg.training.optimizers import local

Stream = Callable[..., Iterator[tuple[str, Tensor]]]


@torch.no_grad()
def load_weights(model: ParallelModel, stream: Stream, where: str, wanted: Callable[[str], bool]) -> None:
    """Fill this rank's part of the model; no rank reads tensors that it holds nothing of.

    Args:
        model: laid out in any way.
        stream: the base's parameters of the names given, one in memory at a time, each cut to what a
            function of its name and whole takes of it.
        where: the base, for errors.
        wanted: which of the model's parameters are the base's.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds numbers that are not finite.
    """
    targets = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}

    def cut(name: str, whole: Tensor) -> Tensor:
        target = targets.get(name)
        if target is None:  # it lies in one tensor with another
            return whole
        if whole.shape != target.shape:
            raise CheckpointError(
                f"{where}: {name} has the shape {list(whole.shape)}, and the model's is "
                f"{list(target.shape)}."
            )
        return local_slice(whole, target)

    missing = set(targets)
    for name, part in stream(frozenset(targets), cut):
        if name not in targets:
            continue
        if not bool(torch.isfinite(part).all()):
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite (NaN or infinite).")
        local(targets[name]).copy_(part)
        missing.discard(name)
    if missing:
        shown = ", ".join(sorted(missing)[:6])
        raise CheckpointError(f"{where}: weights are missing: {shown}.")


@torch.no_grad()
def load_codes(model: ParallelModel, stream: Stream, where: str) -> None:
    """Round the base's matrices into the quantized layers below an adapter, one after the other.

    Args:
        model: laid out; without quantized layers nothing happens.
        stream: as of :func:`load_weights`.
        where: the base, for errors.

    Raises:
        CheckpointError: a matrix is missing: the base is quantized already.
    """
    linears = {
        f"{name}.weight": linear
        for stage in model.stages
        for name, linear in quantized_linears(stage.decoder).items()
    }
    missing = set(linears)
    for name, whole in stream(frozenset(linears)) if linears else ():
        if name in linears:
            linear = linears[name]
            set_whole_matrix(linear, whole)
            missing.discard(name)
    if missing:
        raise CheckpointError(
            f"{where}: {min(missing)} is missing: a base that is quantized already is not tuned; take the "
            "one it was made from."
        )

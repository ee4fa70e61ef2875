"""Weights to compute with, and float32 masters to step: one keeper for every layout that does not
free weights between layers.

As in Megatron (Micikevicius et al. 2018, arXiv 1710.03740): the model that runs holds bf16 or fp16
weights, copied from the masters after each step, so that no operation has to cast its operands; the
gradients of each micro-batch leave in that dtype and are added up in float32 on the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from mtnlg.parallel.gradients import local_part


class Keeper(Protocol):
    """What keeps ``masters`` and the model's own weights in step."""

    masters: dict[str, nn.Parameter]

    def begin(self, num_passes: int) -> None:
        """A step of ``num_passes`` backward passes begins."""

    def collect(self) -> None:
        """Take gradients that were left at the weights without a hook's being called."""

    def finish(self) -> None:
        """All backward passes are over: leave the gradients at the masters."""

    def refresh(self) -> None:
        """Bring the model's weights up to the masters, unless nothing has written to them since."""

    def expect_writes(self) -> None:
        """The masters' memory was given out: it may be written to without their knowing."""


class WorkingCopy:
    """Keeps the working weights of a model in step with float32 masters, and gradients the other way.

    Args:
        parameters: the model's by canonical name, float32; they become the working copy, in place.
            Of a DTensor this rank's part is copied. Frozen ones are their own masters.
        dtype: of the working copy, as ``torch.bfloat16``.
        device: where masters and their gradients are kept; ``None`` is where the model is.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self._weights = {name: item for name, item in parameters.items() if item.requires_grad}
        self._masters = {
            name: master_of(parameter, local_part(parameter.detach()), device)
            for name, parameter in self._weights.items()
        }
        self.masters = {**parameters, **self._masters}
        self._versions: list[int] = []
        for name, weight in parameters.items():
            cast(weight, dtype)
            if weight.requires_grad:
                on_gradient(weight, _Accumulation(self.masters[name]))

    def begin(self, num_passes: int) -> None:
        """Nothing has to be got ready."""

    def collect(self) -> None:
        """Take gradients that were left at the weights without a hook's being called."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                _Accumulation(self.masters[name])(weight)

    def finish(self) -> None:
        """Leave all gradients at the masters."""
        self.collect()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the model, unless nothing has written to them since."""
        versions = [master._version for master in self._masters.values()]
        if versions == self._versions:
            return
        masters = [local_part(master.detach()) for master in self._masters.values()]
        torch._foreach_copy_([local_part(item.detach()) for item in self._weights.values()], masters)
        self._versions = versions

    def expect_writes(self) -> None:
        """Copy at the next :meth:`refresh` whatever the masters know of."""
        self._versions = []


def master_of(parameter: nn.Parameter, part: Tensor, device: torch.device | None = None) -> nn.Parameter:
    """A float32 parameter over the memory of ``part``, laid out as ``parameter``, on ``device``."""
    part = part.to(device or part.device, torch.float32)
    return nn.Parameter(like(parameter, part), requires_grad=parameter.requires_grad)


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """``part`` as this rank's share of a tensor laid out as ``parameter`` (itself where plain)."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def cast(weight: nn.Parameter, dtype: torch.dtype) -> None:
    """Turn ``weight`` into a copy of itself in ``dtype``, for everyone who holds it."""
    copied = local_part(weight.detach()).to(dtype, copy=True)
    if isinstance(weight, DTensor):
        replacement = nn.Parameter(like(weight, copied), requires_grad=weight.requires_grad)
        torch.utils.swap_tensors(weight, replacement)
    else:
        weight.data = copied


def on_gradient(weight: nn.Parameter, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` with ``weight`` whenever a backward pass has finished its gradient."""
    weight.register_post_accumulate_grad_hook(hook)


class _Accumulation:
    """Moves a finished gradient to its master; the working copy's is freed at once."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: Tensor) -> None:
        gradient = weight.grad
        weight.grad = None
        if gradient is None:
            return
        master = self.master
        if isinstance(gradient, DTensor) and isinstance(weight, DTensor) and _moves(gradient, master):
            # Shares of a sum are added up where the other ranks can be reached.
            gradient = gradient.redistribute(placements=weight.placements)
        part = local_part(gradient)
        device = local_part(master.detach()).device
        if master.grad is None:
            master.grad = like(gradient, part.to(device, torch.float32))
        else:
            local_part(master.grad).add_(part.to(device))


def _moves(gradient: DTensor, master: Tensor) -> bool:
    partial = any(isinstance(placement, Partial) for placement in gradient.placements)
    return partial and local_part(master.detach()).device != gradient.to_local().device

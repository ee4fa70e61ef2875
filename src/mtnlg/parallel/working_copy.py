"""Mixed precision with a working copy: float32 masters outside, a 16-bit model inside.

As in Megatron (Micikevicius et al. 2018, arXiv 1710.03740): the model that runs holds bf16 or fp16
weights, copied from the masters after each step, so that no operation has to cast its operands; the
gradients of each micro-batch leave in that dtype and are added up in float32 on the masters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WorkingCopy:
    """Keeps the 16-bit weights of a model in step with float32 masters, and gradients the other way.

    Args:
        parameters: the model's by canonical name, float32; they become the working copy, in place.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self.masters = {
            name: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for name, parameter in parameters.items()
        }
        self._pairs = [(self.masters[name], parameter) for name, parameter in parameters.items()]
        self._versions: list[int] = []
        for parameter in parameters.values():
            parameter.data = parameter.detach().to(dtype)
        for master, weight in self._pairs:
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_Accumulation(master))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the model, unless nothing has written to them since."""
        versions = [master._version for master, _ in self._pairs]
        if versions == self._versions:
            return
        torch._foreach_copy_([weight for _, weight in self._pairs], [master for master, _ in self._pairs])
        self._versions = versions


class _Accumulation:
    """Moves a finished 16-bit gradient to its master; the 16-bit one is freed at once."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad += gradient
        weight.grad = None

"""A tied embedding whose two uses are two stages of one rank (V-shaped pipeline schedules).

Stages are laid out apart from each other, so each has its own copy of the matrix. Only the embedding
counts as a parameter: the optimizer, checkpoints and the gradient norm never see the head's copy, which
hands over its gradients and takes the new values. Where the stages are on two ranks, both copies are
stepped alike instead: see :func:`mtnlg.parallel.gradients.sum_tied_copies`.
"""

from __future__ import annotations

import torch
from torch import nn

from mtnlg.parallel.gradients import finish_partial_sums, local_part


class TiedCopy:
    """The head's copy of the embedding's matrix on the same rank.

    Args:
        original: the embedding's matrix, as this rank holds it.
        copy: the head's, laid out alike.
    """

    def __init__(self, original: nn.Parameter, copy: nn.Parameter) -> None:
        self.original = original
        self.copy = copy
        self._version = -1

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the embedding's values, unless nothing has written to them since."""
        source = local_part(self.original.detach())
        if source._version != self._version:
            local_part(self.copy.detach()).copy_(source)
            self._version = source._version

    @torch.no_grad()
    def hand_over_gradient(self) -> None:
        """Add the head's gradient to the embedding's, whole where it was a partial sum."""
        finish_partial_sums([self.copy])
        gradient, self.copy.grad = self.copy.grad, None
        if gradient is None:
            return
        if self.original.grad is None:
            self.original.grad = gradient
        else:
            local_part(self.original.grad).add_(local_part(gradient))

"""Cross entropy of a head whose matrix is split over the vocabulary.

As in :mod:`mtnlg.model.loss`, each chunk of tokens computes its loss and both gradients at once and
forgets its logits. The ranks exchange three numbers a token (the largest logit, the sum of
exponentials, the label's logit; Shoeybi et al. 2019, section 3), or, gathered, the logits themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from mtnlg.model import IGNORED_LABEL
from mtnlg.model.loss import loss_and_logit_gradient, tokens_per_chunk


class VocabularyParallelLoss:
    """Summed cross entropy over the shards of the vocabulary; takes the place of the plain loss.

    Args:
        mesh: the tensor-parallel axis.
        stream: how hidden states arrive (split over the sequence, or whole on each rank).
        gathers: compute on gathered logits (``parallel_output: false``) instead of the shards.
    """

    def __init__(self, mesh: DeviceMesh, stream: Placement, gathers: bool) -> None:
        self.mesh = mesh
        self.stream = stream
        self.gathers = gathers

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Hidden [batch, sequence or its part, hidden], weight [vocab, hidden], labels [batch, sequence].

        Returns:
            A float32 scalar, the same on all ranks of the axis.
        """
        assert isinstance(weight, DTensor)
        whole = DTensor.from_local(hidden, self.mesh, [self.stream], run_check=False)
        # Each rank's gradient of the hidden states comes from its part of the vocabulary only.
        tokens = whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        shard = weight.to_local(grad_placements=weight.placements)
        shards = _Shards(self.mesh, weight.shape[0])
        return _SplitCrossEntropy.apply(
            tokens.flatten(0, -2), shard, labels.flatten(), shards, self.gathers
        )


class _Shards:
    """Which entries of the vocabulary each rank holds (those of ``torch.chunk``), and exchanges."""

    def __init__(self, mesh: DeviceMesh, vocab_size: int) -> None:
        self.group = mesh.get_group()
        self.count = mesh.size()
        self.vocab_size = vocab_size
        self.largest = -(-vocab_size // self.count)
        self.start = min(vocab_size, mesh.get_local_rank() * self.largest)
        self.end = min(vocab_size, self.start + self.largest)

    def all_reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(value, operation, group=self.group)
        return value

    def gather(self, logits: Tensor) -> Tensor:
        """[tokens, part of vocab] → [tokens, vocab]; short parts are padded on the way."""
        padded = F.pad(logits, (0, self.largest - logits.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, dim=1)[:, : self.vocab_size]


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, targets: Tensor, shards: _Shards, gathers: bool
    ) -> Tensor:
        total, token_gradient, weight_gradient = _loss_and_gradients(
            tokens, weight, targets, shards, gathers, with_gradients=any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(token_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        token_gradient, weight_gradient = ctx.saved_tensors
        scale = output_gradients[0]
        return token_gradient * scale, weight_gradient * scale, None, None, None


def _loss_and_gradients(
    tokens: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: _Shards,
    gathers: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed loss of [tokens, hidden] and its gradients by them and by [part of vocab, hidden]."""
    step = tokens_per_chunk(len(targets), shards.vocab_size if gathers else shards.largest)
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    token_gradient = torch.empty_like(tokens) if with_gradients else None
    weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
    for start in range(0, len(targets), step):
        part, target = tokens[start : start + step], targets[start : start + step]
        logits = F.linear(part, weight).float()  # [chunk, part of vocab]
        if gathers:
            loss, gradient = loss_and_logit_gradient(shards.gather(logits), target)
            gradient = gradient[:, shards.start : shards.end]
        else:
            loss, gradient = _split_loss_and_gradient(logits, target, shards)
        total += loss
        if token_gradient is not None and weight_gradient is not None:
            gradient = gradient.to(weight.dtype)
            token_gradient[start : start + step] = gradient @ weight
            weight_gradient += gradient.t() @ part
    return total, token_gradient, weight_gradient


def _split_loss_and_gradient(logits: Tensor, targets: Tensor, shards: _Shards) -> tuple[Tensor, Tensor]:
    """Loss and gradient by this rank's logits [tokens, part of vocab], whose memory is reused."""
    valid = targets != IGNORED_LABEL
    is_mine = valid & (targets >= shards.start) & (targets < shards.end)
    largest = logits.new_full((len(targets),), float("-inf"))
    if logits.shape[1]:
        largest = logits.amax(dim=1)
    largest = shards.all_reduce(largest, dist.ReduceOp.MAX)
    logits.sub_(largest[:, None])
    rows = is_mine.nonzero().squeeze(1)
    columns = targets[rows] - shards.start
    sums = logits.new_zeros(2, len(targets))  # the label's logit, the sum of exponentials
    sums[0, rows] = logits[rows, columns]
    exponentials = logits.exp_()
    sums[1] = exponentials.sum(dim=1)
    shards.all_reduce(sums, dist.ReduceOp.SUM)
    loss = ((sums[1].log() - sums[0]) * valid).sum()
    gradient = exponentials.div_(sums[1][:, None])
    gradient[rows, columns] -= 1.0
    return loss, gradient.mul_(valid[:, None])

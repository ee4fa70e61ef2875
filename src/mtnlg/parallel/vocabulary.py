"""Embedding, logits and cross entropy of a matrix that is split over the vocabulary.

As in :mod:`mtnlg.model.loss`, each chunk of tokens computes its loss and both gradients at once and
forgets its logits. The ranks exchange two numbers a token in one message (the logarithm of the sum of
exponentials over a rank's shard, and the label's logit; compare Shoeybi et al. 2019, section 3), or,
gathered, the logits themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtnlg.model import IGNORED_LABEL
from mtnlg.model.loss import (
    loss_and_logit_gradient,
    scaled,
    softcap_slope,
    softcapped,
    tokens_per_chunk,
)
from mtnlg.parallel.exchange import TensorAxis, all_gather, all_reduce

BLOCK_BYTES = 2**22  # logits that stay in a processor's cache between the passes over them


class VocabularyParallelLoss:
    """Summed cross entropy over the shards of the vocabulary; takes the place of the plain loss.

    Args:
        axis: the tensor-parallel ranks.
        gathers: compute on gathered logits (``parallel_output: false``) instead of the shards.
        product: computes ``hidden @ weight.T``.
    """

    def __init__(self, axis: TensorAxis, gathers: bool, product: Callable[..., Tensor] = F.linear) -> None:
        self.axis = axis
        self.gathers = gathers
        self.product = product

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        runs_once: bool = True,
        softcap: float | None = None,
    ) -> Tensor:
        """Hidden [batch, sequence or its part, hidden], weight [vocab, hidden], labels [batch, sequence].

        With ``runs_once`` the backward pass runs at most once, and uses up what it keeps; ``softcap`` is
        that of :func:`mtnlg.model.loss.softcapped`.

        Returns:
            A float32 scalar, the same on all ranks of the axis.
        """
        assert isinstance(weight, DTensor)
        # Each rank's gradient of the hidden states comes from its part of the vocabulary only.
        tokens = self.axis.enter(hidden).flatten(0, -2)
        shards = _Shards(self.axis, weight.shape[0])
        return _SplitCrossEntropy.apply(
            tokens,
            weight.to_local(),
            labels.flatten(),
            shards,
            self.gathers,
            self.product,
            runs_once,
            softcap,
        )


def look_up_tokens(token_ids: Tensor, shard: Tensor, axis: TensorAxis, vocab_size: int) -> Tensor:
    """[batch, sequence] → [batch, sequence, hidden], zero for tokens of other ranks' shards."""
    start = _Shards(axis, vocab_size).start
    rows = token_ids - start
    elsewhere = (rows < 0) | (rows >= len(shard))
    found = F.embedding(rows.masked_fill(elsewhere, 0), shard)
    return found.masked_fill(elsewhere[..., None], 0.0)


def gather_logits(logits: Tensor, axis: TensorAxis, vocab_size: int) -> Tensor:
    """[..., part of vocab] → [..., vocab], on every rank."""
    return _GatherLogits.apply(logits, _Shards(axis, vocab_size))


class _Shards:
    """Which entries of the vocabulary each rank holds (those of ``torch.chunk``)."""

    def __init__(self, axis: TensorAxis, vocab_size: int) -> None:
        self.axis = axis
        self.vocab_size = vocab_size
        self.largest = -(-vocab_size // axis.size)
        self.start = min(vocab_size, axis.rank * self.largest)
        self.end = min(vocab_size, self.start + self.largest)

    def gather(self, logits: Tensor) -> Tensor:
        """[..., part of vocab] → [..., vocab]; short parts are padded on the way."""
        padded = F.pad(logits, (0, self.largest - logits.shape[-1]))
        whole = all_gather(padded.flatten(0, -2), self.axis.group, self.axis.size, dim=1)
        return whole[:, : self.vocab_size].reshape(*logits.shape[:-1], self.vocab_size)


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shards: _Shards) -> Tensor:
        ctx.shards = shards
        return shards.gather(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank computes the same from whole logits, so each holds the whole gradient.
        return gradients[0][..., ctx.shards.start : ctx.shards.end], None


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        targets: Tensor,
        shards: _Shards,
        gathers: bool,
        product: Callable[..., Tensor],
        runs_once: bool,
        softcap: float | None,
    ) -> Tensor:
        ctx.runs_once = runs_once
        total, *gradients = _loss_and_gradients(
            tokens,
            weight,
            targets,
            shards,
            gathers,
            product,
            softcap,
            with_gradients=any(ctx.needs_input_grad),
            wants_weight=ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = scaled(ctx.saved_tensors, output_gradients[0], ctx.runs_once)
        return (*found, *[None] * (8 - len(found)))


def _loss_and_gradients(
    tokens: Tensor,
    weight: Tensor,
    targets: Tensor,
    shards: _Shards,
    gathers: bool,
    product: Callable[..., Tensor],
    softcap: float | None,
    with_gradients: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed loss of [tokens, hidden] and its gradients by them and by [part of vocab, hidden]."""
    step = tokens_per_chunk(len(targets), shards.vocab_size if gathers else shards.largest)
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    token_gradient = torch.empty_like(tokens) if with_gradients else None
    weight_gradient: Tensor | None = None
    for start in range(0, len(targets), step):
        part, target = tokens[start : start + step], targets[start : start + step]
        logits = softcapped(product(part, weight).float(), softcap)  # [chunk, part of vocab]
        slope = None if softcap is None else softcap_slope(logits, softcap)
        if gathers:
            loss, gradient = loss_and_logit_gradient(shards.gather(logits), target)
            gradient = gradient[:, shards.start : shards.end]
        else:
            loss, gradient = _split_loss_and_gradient(logits, target, shards)
        total += loss
        if token_gradient is not None:
            gradient = (gradient if slope is None else gradient * slope).to(weight.dtype)
            token_gradient[start : start + step] = product(gradient, weight.t())
            if not wants_weight:  # a frozen head has no gradient
                continue
            update = gradient.t() @ part  # [part of vocab, hidden]
            if weight_gradient is None:
                weight_gradient = update if step >= len(targets) else update.float()
            else:
                weight_gradient += update
    if wants_weight and weight_gradient is None:
        weight_gradient = torch.zeros_like(weight)
    return total, token_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype)


def _split_loss_and_gradient(logits: Tensor, targets: Tensor, shards: _Shards) -> tuple[Tensor, Tensor]:
    """Loss and gradient by this rank's logits [tokens, part of vocab], whose memory is reused."""
    valid = targets != IGNORED_LABEL
    is_mine = valid & (targets >= shards.start) & (targets < shards.end)
    rows = is_mine.nonzero().squeeze(1)
    columns = targets[rows] - shards.start
    # One row for each rank's log Σ exp over its shard and one for the label's logit, to be summed.
    shared = logits.new_zeros(shards.axis.size + 1, len(targets))
    shared[-1, rows] = logits[rows, columns]
    shared[shards.axis.rank] = _softmax_in_place(logits)
    shared = all_reduce(shared, shards.axis.group)
    normalizer = shared[:-1].logsumexp(dim=0)
    loss = ((normalizer - shared[-1]) * valid).sum()
    # A shard's share of the softmax: its own softmax by its share of the sum of exponentials.
    share = (shared[shards.axis.rank] - normalizer).exp() * valid
    gradient = logits.mul_(share[:, None])
    gradient[rows, columns] -= 1.0
    return loss, gradient


def _softmax_in_place(logits: Tensor) -> Tensor:
    """Turn float32 logits [tokens, part of vocab] into their softmax; return log Σ exp, [tokens]."""
    count, columns = logits.shape
    normalizer = logits.new_full((count,), -torch.inf)
    if columns == 0:
        return normalizer
    step = max(1, BLOCK_BYTES // (4 * columns)) if logits.device.type == "cpu" else max(1, count)
    for block, part in zip(logits.split(step), normalizer.split(step)):
        softmax = block.softmax(dim=1)
        # log Σ exp(x) = max x - log max softmax(x): no second pass of exponentials.
        part.copy_(block.amax(dim=1) - softmax.amax(dim=1).log())
        block.copy_(softmax)
    return normalizer

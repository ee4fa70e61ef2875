"""Cross entropy of a linear head, without ever holding the logits of all tokens.

The gradient of ``sum(-log softmax(h Wᵀ)[label])`` by the logits is ``softmax - onehot``: it is known as
soon as the logits are, so each chunk of tokens computes its loss and both gradients at once and
forgets its logits. Memory is one chunk of logits instead of [tokens, vocabulary] twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
LOGITS_BYTES = 2**28  # float32 logits held at once

Product = Callable[[Tensor, Tensor], Tensor]


def tokens_per_chunk(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose float32 logits fit into ``LOGITS_BYTES``, in chunks of nearly equal size."""
    largest = max(1, LOGITS_BYTES // (4 * vocab_size))
    num_chunks = -(-num_tokens // largest)
    return -(-num_tokens // num_chunks) if num_chunks else 1


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    product: Product = F.linear,
    block_bytes: int | None = None,
    runs_once: bool = True,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` over all labels that are not ignored.

    Args:
        hidden: [batch, sequence, hidden], already normalized.
        weight: [vocab, hidden] of the head.
        labels: [batch, sequence]; ``-100`` is ignored.
        product: computes ``hidden @ weight.T``.
        block_bytes: float32 logits that are made into a loss and gradient at once; ``None`` is a
            quarter of a chunk. A block that stays in a processor's cache is read from memory only once.
        runs_once: whether the backward pass runs at most once, and may use up what it keeps.
        softcap: see :func:`softcapped`.

    Returns:
        A float32 scalar in nats, the sum and not the mean: the caller divides by the number of valid
        tokens of the whole step.
    """
    tokens, targets = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (tokens.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(
            tokens, weight, targets, product, block_bytes or LOGITS_BYTES // 4, runs_once, softcap
        )
    step = tokens_per_chunk(len(targets), weight.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for part, target in zip(tokens.split(step), targets.split(step)):
        logits = softcapped(product(part, weight).float(), softcap)
        total = total + F.cross_entropy(logits, target, ignore_index=IGNORED_LABEL, reduction="sum")
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        targets: Tensor,
        product: Product,
        block_bytes: int,
        runs_once: bool,
        softcap: float | None,
    ) -> Tensor:
        ctx.runs_once = runs_once
        wants_weight = ctx.needs_input_grad[1]  # a frozen head has no gradient
        step = tokens_per_chunk(len(targets), weight.shape[0])
        rows = max(1, block_bytes // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=tokens.device)
        token_gradient = torch.empty_like(tokens)
        weight_gradient: Tensor | None = None
        for start in range(0, len(targets), step):
            part, target = tokens[start : start + step], targets[start : start + step]
            logits = product(part, weight)  # [chunk, vocab], soon their own gradient
            for block, labels in zip(logits.split(rows), target.split(rows)):
                capped = softcapped(block.float(), softcap)
                loss, gradient = loss_and_logit_gradient(capped, labels)
                block.copy_(gradient if softcap is None else gradient * softcap_slope(capped, softcap))
                total += loss
            token_gradient[start : start + step] = logits @ weight.to(logits.dtype)
            if not wants_weight:
                continue
            update = logits.t() @ part.to(logits.dtype)  # [vocab, hidden]
            if weight_gradient is None:
                weight_gradient = update if step >= len(targets) else update.float()
            else:
                weight_gradient += update
        if weight_gradient is None and wants_weight:
            weight_gradient = torch.zeros_like(weight)
        gradients = [token_gradient]
        if weight_gradient is not None:
            gradients.append(weight_gradient.to(weight.dtype))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = scaled(ctx.saved_tensors, output_gradients[0], ctx.runs_once)
        return (*found, *[None] * (7 - len(found)))


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap · tanh(logits / softcap)``; ``None`` leaves them (Gemma 2, arXiv 2408.00118)."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of :func:`softcapped` by its input, from its result: ``1 - tanh²``."""
    return 1.0 - (capped / softcap).square()


def scaled(gradients: Iterable[Tensor], factor: Tensor, in_place: bool) -> list[Tensor]:
    """``gradients`` times ``factor``.

    In place, torch refuses a second pass through the changed tensors instead of erring.
    """
    return [gradient.mul_(factor) if in_place else gradient * factor for gradient in gradients]


def loss_and_logit_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of float32 ``logits`` [tokens, vocab], and its gradient by them."""
    valid = targets != IGNORED_LABEL
    index = targets.where(valid, 0)[:, None]
    gradient = logits.softmax(dim=1)
    # log Σ exp(x) = max x - log max softmax(x): one pass of exponentials serves loss and gradient.
    normalizer = logits.amax(dim=1, keepdim=True) - gradient.amax(dim=1, keepdim=True).log()
    loss = ((normalizer - logits.gather(1, index)).squeeze(1) * valid).sum()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    if not bool(valid.all()):
        gradient.mul_(valid[:, None])
    return loss, gradient

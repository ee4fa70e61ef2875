"""Cross entropy of a linear head, without ever holding the logits of all tokens.

The gradient of ``sum(-log softmax(h Wᵀ)[label])`` by the logits is ``softmax - onehot``: it is known as
soon as the logits are, so each chunk of tokens computes its loss and both gradients at once and
forgets its logits. Memory is one chunk of logits instead of [tokens, vocabulary] twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
LOGITS_BYTES = 2**28  # float32 logits held at once


def tokens_per_chunk(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose float32 logits fit into ``LOGITS_BYTES``, in chunks of nearly equal size."""
    largest = max(1, LOGITS_BYTES // (4 * vocab_size))
    num_chunks = -(-num_tokens // largest)
    return -(-num_tokens // num_chunks) if num_chunks else 1


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of ``hidden @ weight.T`` over all labels that are not ignored.

    Args:
        hidden: [batch, sequence, hidden], already normalized.
        weight: [vocab, hidden] of the head.
        labels: [batch, sequence]; ``-100`` is ignored.

    Returns:
        A float32 scalar in nats, the sum and not the mean: the caller divides by the number of valid
        tokens of the whole step.
    """
    tokens, targets = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (tokens.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(tokens, weight, targets)
    step = tokens_per_chunk(len(targets), weight.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for part, target in zip(tokens.split(step), targets.split(step)):
        logits = F.linear(part, weight).float()
        total = total + F.cross_entropy(logits, target, ignore_index=IGNORED_LABEL, reduction="sum")
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        step = tokens_per_chunk(len(targets), weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=tokens.device)
        token_gradient = torch.empty_like(tokens)
        weight_gradient: Tensor | None = None
        for start in range(0, len(targets), step):
            part = tokens[start : start + step]
            logits = F.linear(part, weight).float()  # [chunk, vocab]
            loss, gradient = loss_and_logit_gradient(logits, targets[start : start + step])
            total += loss
            gradient = gradient.to(weight.dtype)
            torch.mm(gradient, weight, out=token_gradient[start : start + step])
            product = gradient.t() @ part  # [vocab, hidden]
            if weight_gradient is None:
                weight_gradient = product if step >= len(targets) else product.float()
            else:
                weight_gradient += product
        if weight_gradient is None:
            weight_gradient = torch.zeros_like(weight)
        ctx.save_for_backward(token_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        token_gradient, weight_gradient = ctx.saved_tensors
        scale = output_gradients[0]
        return token_gradient * scale, weight_gradient * scale, None


def loss_and_logit_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of float32 ``logits`` [tokens, vocab] and its gradient, in their memory."""
    valid = targets != IGNORED_LABEL
    index = targets.where(valid, 0)[:, None]
    chosen = logits.gather(1, index)
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    loss = ((normalizer - chosen).squeeze(1) * valid).sum()
    gradient = logits.sub_(normalizer).exp_()
    gradient.scatter_add_(1, index, torch.full_like(chosen, -1.0))
    if not bool(valid.all()):
        gradient.mul_(valid[:, None])
    return loss, gradient

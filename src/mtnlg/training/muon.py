"""Muon's update: momentum, orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import torch
from torch import Tensor

# A quintic that pulls every singular value of a matrix of norm at most 1 close to 1 in five rounds.
# Its slope at 0 is as steep as the coefficients allow, at the price of ending within 0.7 to 1.2.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5


def orthogonalize(matrix: Tensor, rounds: int = NEWTON_SCHULZ_ROUNDS) -> Tensor:
    """Approximately ``U Vᵀ`` of the singular value decomposition ``U S Vᵀ`` of ``matrix``.

    Experts' matrices [experts, rows, columns] are orthogonalised one by one.

    Each round is ``X ← aX + (bA + cA²)X`` with ``A = XXᵀ``, on the side where ``A`` is smaller.

    Args:
        matrix: [rows, columns] or [experts, rows, columns]; the result has its shape and dtype.
        rounds: Newton-Schulz rounds.
    """
    if matrix.dim() == 3:
        return torch.stack([orthogonalize(item, rounds) for item in matrix])
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    transposed = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if transposed else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT.contiguous() if transposed else x


def update_direction(gradient: Tensor, momentum_buffer: Tensor, momentum: float) -> Tensor:
    """Take ``gradient`` into ``momentum_buffer`` (in place) and return Nesterov's direction."""
    momentum_buffer.lerp_(gradient, 1.0 - momentum)
    return gradient.lerp(momentum_buffer, momentum)


def rate_factor(rows: int, columns: int) -> float:
    """Muon's rate for a matrix of this shape: ``sqrt(max(1, rows / columns))`` times the base rate."""
    return max(1.0, rows / columns) ** 0.5

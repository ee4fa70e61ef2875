"""Training steps of this project and of others, at one shape and one set of rules.

Each module has ``build(shape, precision, device, threads) -> Contender``. The rules are the same for all:
GPT-2's block (pre-LN, biases, learned positions, exact GELU, tied head, no dropout), AdamW with fused
kernels, gradient norm clipped to 1, float32 weights and optimizer state whatever the precision.
Where a project offers something else by default (positions, a head's tie), its module says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PEERS = ("mtnlg", "transformers", "litgpt", "megatron", "nanogpt")
BETAS, LEARNING_RATE, WEIGHT_DECAY, CLIP = (0.9, 0.95), 3e-4, 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A decoder's size and the batch it is trained on."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, matrix products only, attention in full (arXiv 2104.04473)."""
        linear = 12 * self.layers * self.hidden**2
        attention = 2 * self.layers * self.sequence * self.hidden
        return 6.0 * (linear + attention + self.vocab * self.hidden)

    @property
    def num_parameters(self) -> int:
        layer = 12 * self.hidden**2 + 13 * self.hidden
        return self.layers * layer + (self.vocab + self.sequence + 2) * self.hidden


@dataclass
class Contender:
    """What the driver times.

    Args:
        num_parameters: of the model, shared matrices counted once.
        steps: for each mode (``eager``, ``compile``) a whole training step that returns its loss.
        note: where this peer departs from the common rules.
    """

    num_parameters: int
    steps: dict[str, Callable[[], float]] = field(default_factory=dict)
    note: str = ""


def random_tokens(shape: Shape, device: str) -> torch.Tensor:
    """The same random tokens for everybody, [batch, sequence + 1]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.sequence + 1), generator=generator)
    return tokens.to(device)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The usual optimizer: fused, weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def plain_steps(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module], torch.Tensor],
    precision: str,
    device: str,
) -> dict[str, Callable[[], float]]:
    """The loop that users of these projects write: autocast, backward, clip, AdamW."""
    optimizer = adamw(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step_with(module: torch.nn.Module) -> float:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = loss_of(module)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    compiled = torch.compile(model)
    return {"eager": lambda: step_with(model), "compile": lambda: step_with(compiled)}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(peer: str, shape: Shape, precision: str, device: str, threads: int) -> Contender:
    """Import the peer's module and build it."""
    module = importlib.import_module(f"peers.{peer}_peer")
    return module.build(shape, precision, device, threads)

"""What a rule that guides generation looks like to the engine, and how its mask meets the logits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtnlg.config.errors import MtnlgError

WORD_BITS = 32


class DeadEndError(MtnlgError):
    """What a request asks for allows no next token: its rules, alone or together, lead nowhere."""


class ConstraintState(Protocol):
    """How far one sequence has come in a rule."""

    def fill_mask(self, bitmask: Tensor) -> None:
        """Say which tokens may come next.

        Args:
            bitmask: int32 [ceil(vocab / 32)] on the CPU, to be overwritten: bit ``i % 32`` of word
                ``i // 32`` is set where token ``i`` is allowed.
        """

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allowed."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow, so that the sequence ends here."""

    def copy(self) -> ConstraintState:
        """The same state, to be tried out (beam search, speculation)."""


class Constraint(Protocol):
    """A compiled rule; many requests may share one."""

    def start(self) -> ConstraintState:
        """The state before the first generated token."""


def empty_bitmask(rows: int, vocab_size: int) -> Tensor:
    """Room for the masks of so many sequences: int32 [rows, ceil(vocab / 32)] on the CPU."""
    return torch.zeros(rows, -(-vocab_size // WORD_BITS), dtype=torch.int32)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Rule out, in place, the tokens that a mask does not allow.

    Args:
        logits: [rows, vocab] on any device.
        bitmask: int32 [rows, ceil(vocab / 32)] on the CPU.
    """
    if logits.device.type == "cpu":
        octets = bitmask.numpy().view(np.uint8)  # little-endian words: bit 0 is in the first byte
        allowed = np.unpackbits(octets, axis=-1, count=logits.shape[-1], bitorder="little")
        logits.masked_fill_(torch.from_numpy(allowed) == 0, float("-inf"))
        return
    words = bitmask.to(logits.device, non_blocking=True)
    shifts = torch.arange(WORD_BITS, device=logits.device, dtype=torch.int32)
    bits = (words[..., None] >> shifts) & 1  # [rows, words, 32]
    logits.masked_fill_(bits.flatten(-2)[..., : logits.shape[-1]] == 0, float("-inf"))

"""What a rule that guides generation looks like to the engine, and how its mask meets the logits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.native import NativeKernel

WORD_BITS = 32
WORTH_THREADS = 32  # rows; waking a thread takes as long as half of them
# float32 [256, 8]: for each byte of a mask, 0 where its bits are set and -inf where not.
MASK_OF_OCTET = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") > 0,
    np.float32(0.0),
    np.float32("-inf"),
)

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
MASK = NativeKernel(
    "mask.cpp", "mtnlg_mask", [_POINTER, _INTEGER, _POINTER, _INTEGER, _POINTER, *[_INTEGER] * 2], []
)


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


def rule_out(scores: Tensor, rows: Sequence[int], bitmask: Tensor) -> None:
    """Give, in place, the tokens that a mask does not allow a score of minus infinity.

    Args:
        scores: float32 [.., vocab] on any device, contiguous.
        rows: which of its rows have a mask.
        bitmask: int32 [len(rows), ceil(vocab / 32)] on the CPU, contiguous.
    """
    vocab = scores.shape[-1]
    if scores.device.type != "cpu":
        shifts = torch.arange(WORD_BITS, device=scores.device, dtype=torch.int32)
        words = bitmask.to(scores.device, non_blocking=True)
        bits = (words[..., None] >> shifts) & 1  # [rows, words, 32]
        forbidden = bits.flatten(-2)[:, :vocab] == 0
        if len(rows) == len(scores):
            scores.masked_fill_(forbidden, float("-inf"))
        else:
            scores[rows] = scores[rows].masked_fill_(forbidden, float("-inf"))
        return
    if MASK.loaded is not None:
        places = np.array(rows, dtype=np.int64)
        MASK.loaded(
            scores.data_ptr(),
            vocab,
            places.ctypes.data,
            len(places),
            bitmask.data_ptr(),
            bitmask.shape[1],
            torch.get_num_threads() if len(places) >= WORTH_THREADS else 1,
        )
        return
    octets = bitmask.numpy().view(np.uint8)  # little-endian words: bit 0 is in the first byte
    added = np.empty((octets.shape[1], 8), np.float32)
    for place, row in enumerate(rows):  # a sum with zeros and -inf takes a ninth of masked_fill_'s time
        MASK_OF_OCTET.take(octets[place], axis=0, out=added, mode="clip")
        of_row = scores[row].numpy()
        np.add(of_row, added.reshape(-1)[:vocab], out=of_row)

"""What a rule that guides generation looks like to the engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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

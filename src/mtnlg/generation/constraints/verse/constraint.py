"""Verse as a rule that guides generation: the poem cannot leave its form."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.constraints.verse.forms import VerseForm
from mtnlg.generation.constraints.verse.masks import VerseMasks
from mtnlg.generation.constraints.verse.rules import Place, VerseRules
from mtnlg.generation.constraints.verse.tokens import VerseTokens, letter_length, verse_tokens
from mtnlg.tokens.tokenizer import Tokenizer


class VerseConstraint:
    """A form of verse over a tokenizer's vocabulary.

    Args:
        rules: the form.
        tokens: the vocabulary.
        end_ids: tokens allowed once the poem is whole.
    """

    def __init__(self, rules: VerseRules, tokens: VerseTokens, end_ids: Collection[int]) -> None:
        self.rules, self.tokens, self.end_ids = rules, tokens, frozenset(end_ids)
        self.masks = VerseMasks(rules, tokens)

    def start(self) -> VerseState:
        """The state before the first generated token."""
        return VerseState(self, self.rules.begun, b"")


class VerseState:
    """How far one poem has come; see ``ConstraintState``."""

    def __init__(self, constraint: VerseConstraint, place: Place, pending: bytes) -> None:
        self._constraint, self._place, self._pending = constraint, place, pending

    def fill_mask(self, bitmask: Tensor) -> None:
        """Write which tokens may come next into int32 [ceil(vocab / 32)].

        Raises:
            MtnlgError: the tokenizer has no token to go on with.
        """
        if self.is_complete:
            bitmask.zero_()
            for token in self._constraint.end_ids:
                bitmask[token // 32] |= _signed(1 << token % 32)
            return
        bitmask.numpy()[:] = self._constraint.masks.mask(self._place, self._pending)

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allowed.

        Raises:
            MtnlgError: it did not.
        """
        if self.is_complete and token in self._constraint.end_ids:
            return
        piece = self._constraint.tokens.pieces.get(token)
        place: Place | None = None if piece is None else self._place
        pending = self._pending
        if piece is not None and place is not None:
            letters = list(piece.letters)
            pending += piece.lead
            if piece.lead and len(pending) == letter_length(pending[0]):
                letters.insert(0, self._constraint.tokens.letter_of(pending))
                pending = b""
            for letter in letters:
                place = None if place is None else self._constraint.rules.step(place, letter)
            pending += piece.tail
        if place is None:
            raise MtnlgError(f"token {token} does not fit the verse.")
        self._place, self._pending = place, pending

    @property
    def is_complete(self) -> bool:
        """Whether the poem is whole."""
        return self._place.slot == self._constraint.rules.end

    def copy(self) -> VerseState:
        """The same state, independent of this one."""
        return VerseState(self._constraint, self._place, self._pending)


def verse_constraint(
    tokenizer: Tokenizer, vocab_size: int, value: Any, end_ids: tuple[int, ...] = ()
) -> VerseConstraint:
    """A form of verse as a constraint.

    Args:
        tokenizer: of the model.
        vocab_size: tokens the model gives logits for.
        value: see :meth:`VerseForm.from_value`.
        end_ids: tokens that end a sequence.

    Raises:
        ConfigError: there is no such form, or nothing can fulfil it.
    """
    return _compile(tokenizer.definition, vocab_size, VerseForm.from_value(value), end_ids)


@lru_cache(maxsize=32)
def _compile(
    definition: str, vocab_size: int, form: VerseForm, end_ids: tuple[int, ...]
) -> VerseConstraint:
    tokens = verse_tokens(definition, vocab_size)
    return VerseConstraint(VerseRules(form, tokens.spellable), tokens, end_ids)


def _signed(word: int) -> int:
    """The 32 bits of ``word`` as a signed number."""
    return word - (1 << 32) if word >= 1 << 31 else word

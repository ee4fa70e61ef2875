"""All tokens of a vocabulary at one place of a poem, taken letter by letter at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mtnlg.generation.constraints.verse.rules import ALL_RHYMES, MARK_TONE, Path, VerseRules
from mtnlg.generation.constraints.verse.tokens import Ints, TokenTable

Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.intp]
NO_LETTER = -1
FEW = 500  # tokens whose bits are set one by one


@dataclass(frozen=True)
class Tail:
    """Tokens that end within a letter of which it matters how it rhymes.

    Args:
        offset: the slot of that letter or of the marks that may be left out before it, from the place on.
        fits: the patterns that the line fits there.
        tokens: int32 [tokens], their ids.
        numbers: int32 [tokens], how ``beginnings`` numbers what they begin.
    """

    offset: int
    fits: int
    tokens: Ints
    numbers: Ints


@dataclass(frozen=True)
class Part:
    """The tokens that may come next at one place and on one path, as far as rhymes do not decide.

    Args:
        number: no other part has it.
        table: the tokens.
        free: int32 [ceil(vocab / 32)], bits of those that no rhyme can forbid.
        tokens: int32 [rhyming], those with one rhyming letter, in the order of it.
        letters: int32 [rhyming], that letter.
        rhymes: bits of all rhymes of these letters.
        tails: those without one that end within one.
        hard: rows of the table with several of them, or one and an end within one: to be tried one by
            one. Only where lines are very short or tokens very long.
    """

    number: int
    table: TokenTable
    free: Ints
    tokens: Ints
    letters: Ints
    rhymes: int
    tails: tuple[Tail, ...]
    hard: Numbers

    @property
    def is_rhyming(self) -> bool:
        """Whether what has rhymed before decides about any token."""
        return bool(len(self.tokens) or self.tails or len(self.hard))


@dataclass
class _Rows:
    """Tokens that are being taken.

    Args:
        rows: which of the table.
        fits: of each, the patterns of its present line that it still fits.
        own: of each, its letter that rhymes, or ``NO_LETTER``; ``None`` while no token has one.
        again: of each, whether it has another.
    """

    rows: Numbers
    fits: Bits
    own: Ints | None = None
    again: Bools | None = None

    def where(self, kept: Bools) -> _Rows:
        """Some of them."""
        own = None if self.own is None else self.own[kept]
        again = None if self.again is None else self.again[kept]
        return _Rows(self.rows[kept], self.fits[kept], own, again)


class Walk:
    """The tokens of a table along one path.

    Args:
        rules: the form.
        table: the tokens.
        tones: uint8 [rows, most letters] of their letters.
        scheme: of the path.
        begun: bool [beginnings], which of them may come next at a slot of a path.
    """

    def __init__(
        self,
        rules: VerseRules,
        table: TokenTable,
        tones: Bits,
        scheme: int,
        begun: Callable[[int, Path], Bools],
    ) -> None:
        self.rules, self.table, self.tones, self.scheme, self.begun = rules, table, tones, scheme, begun
        self._free: list[Numbers] = []
        self._rhyming: list[Numbers] = []
        self._own: list[Ints] = []
        self._hard: list[Numbers] = []
        self._tails: list[Tail] = []
        self._start = 0

    def go(self, slot: int, fits: int, num_words: int, number: int) -> Part:
        """Take every token from this slot on.

        Args:
            slot: where the poem stands.
            fits: bits of the patterns that its present line still fits.
            num_words: length of a mask.
            number: of the part.
        """
        self._start = slot
        if self.table.num_lettered:
            self._take(self._firsts(slot, fits), 0, slot)
        tail_alone = np.flatnonzero(self.table.counts == 0)
        self._end(_Rows(tail_alone, np.full(len(tail_alone), fits, np.uint8)), slot)
        letters = np.concatenate([*self._own, np.zeros(0, np.int32)])
        order = letters.argsort(kind="stable")
        rows = np.concatenate([*self._rhyming, np.zeros(0, np.intp)])[order]
        free = np.concatenate([*self._free, np.zeros(0, np.intp)])
        return Part(
            number,
            self.table,
            packed(self.table.tokens[free], num_words),
            self.table.tokens[rows],
            letters[order],
            int(np.bitwise_or.reduce(self.rules.rhymes[letters], initial=np.uint32(0))),
            tuple(self._tails),
            np.concatenate([*self._hard, np.zeros(0, np.intp)]),
        )

    def _firsts(self, slot: int, fits: int) -> _Rows:
        """Tokens with letters; most fall at their first, so that one is looked at in whole columns."""
        firsts = self.tones[: self.table.num_lettered, 0]
        at = self.rules.slots[slot]
        if at.marks:
            taken = firsts >= MARK_TONE
            if at.may_skip:
                taken |= self._fitting(slot + 1, fits)[firsts]
        else:
            taken = self._fitting(slot, fits)[firsts]
        rows = np.flatnonzero(taken)
        return _Rows(rows, np.full(len(rows), fits, np.uint8))

    def _fitting(self, slot: int, fits: int) -> Bools:
        """bool [tones]: which tones these patterns take at a letter's slot."""
        return (self.rules.fits[self.scheme][slot] & np.uint8(fits)) > 0

    def _take(self, taken: _Rows, column: int, slot: int) -> None:
        """Take the letter in ``column`` of these rows at a slot of the poem."""
        if not len(taken.rows) or slot == self.rules.end:
            return
        at = self.rules.slots[slot]
        letters = self.table.letters[taken.rows, column]
        if at.marks:
            is_mark = (self.rules.marks[letters] & at.marks) > 0
            if at.may_skip:
                self._take(taken.where(~is_mark), column, slot + 1)
            self._next(taken.where(is_mark), column + 1, slot + 1)
            return
        fits = taken.fits & self.rules.fits[self.scheme][slot][self.tones[taken.rows, column]]
        kept = fits > 0
        if at.place == 0 and self.rules.heads:
            kept &= letters == self.rules.heads[at.line]
        if self.rules.is_rhyme(self.scheme, at):
            kept &= self.rules.rhymes[letters] > 0
            taken = _with_own(taken, letters)
        if at.ends_line:
            fits = np.full(len(fits), self.rules.all_patterns(self.scheme, at.line + 1), np.uint8)
        self._next(replace(taken, fits=fits).where(kept), column + 1, slot + 1)

    def _next(self, taken: _Rows, column: int, slot: int) -> None:
        """File the tokens that are used up; go on with the others."""
        done = self.table.counts[taken.rows] == column
        if done.any():
            self._end(taken.where(done), slot)
            taken = taken.where(~done)
        self._take(taken, column, slot)

    # -- tokens that end

    def _end(self, ended: _Rows, slot: int) -> None:
        has_tail = self.table.tails[ended.rows] > 0
        if not has_tail.any():
            self._file(ended)
            return
        self._file(ended.where(~has_tail))
        ended = ended.where(has_tail)
        is_rhyming = self._may_rhyme(slot)
        for fits in np.unique(ended.fits).tolist():
            some = ended.where(ended.fits == fits)
            if is_rhyming:
                self._end_in_rhyme(some, slot, fits)
            else:
                path = Path(self.scheme, fits, ALL_RHYMES)
                begun = self.begun(slot, path)
                self._file(some.where(begun[self._tail_numbers(some.rows)]))

    def _file(self, ended: _Rows) -> None:
        """Tokens that are taken to their end, if their rhyme is right."""
        if ended.own is None or ended.again is None:
            self._free.append(ended.rows)
            return
        is_free = ended.own == NO_LETTER
        is_one = ~is_free & ~ended.again
        self._free.append(ended.rows[is_free])
        self._rhyming.append(ended.rows[is_one])
        self._own.append(ended.own[is_one])
        self._hard.append(ended.rows[ended.again])

    def _end_in_rhyme(self, ended: _Rows, slot: int, fits: int) -> None:
        rows = ended.rows
        if ended.own is not None:
            self._hard.append(rows[ended.own != NO_LETTER])
            rows = rows[ended.own == NO_LETTER]
        if len(rows):
            offset = slot - self._start
            self._tails.append(Tail(offset, fits, self.table.tokens[rows], self._tail_numbers(rows)))

    def _tail_numbers(self, rows: Numbers) -> Ints:
        return self.table.tail_numbers[self.table.tails[rows]]

    def _may_rhyme(self, slot: int) -> bool:
        """Whether the letter that begins at this slot may be one that rhymes."""
        slots = self.rules.slots
        while slot < self.rules.end and slots[slot].marks and slots[slot].may_skip:
            slot += 1
        return slot < self.rules.end and self.rules.is_rhyme(self.scheme, slots[slot])


def _with_own(taken: _Rows, letters: Ints) -> _Rows:
    """The rows with these letters as those that rhyme."""
    if taken.own is None or taken.again is None:
        return replace(taken, own=letters, again=np.zeros(len(letters), bool))
    had_one = taken.own != NO_LETTER
    return replace(taken, own=np.where(had_one, taken.own, letters), again=taken.again | had_one)


def packed(tokens: Ints, num_words: int) -> Ints:
    """int32 [num_words]: bits of these tokens."""
    if len(tokens) < FEW:
        words = np.zeros(num_words, np.int32)
        set_bits(words, tokens)
        return words
    bits = np.zeros(num_words * 32, bool)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def set_bits(words: Ints, tokens: Ints) -> None:
    """Set the bits of a few tokens."""
    np.bitwise_or.at(words.view(np.uint32), tokens >> 5, np.uint32(1) << (tokens & 31).astype(np.uint32))

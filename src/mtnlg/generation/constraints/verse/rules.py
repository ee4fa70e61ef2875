"""A form of verse as a machine over letters, and over whole vocabularies at once.

A poem is a row of slots: letters, marks between the lines, and new lines that may be left out. What has
been written so far follows one or more schemes of the form; for each the machine remembers which patterns
of the present line it still fits, and which rhymes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtnlg.config.errors import ConfigError
from mtnlg.generation.constraints.verse.forms import Scheme, VerseForm
from mtnlg.generation.constraints.verse.rhymes import (
    BREAK,
    COMMA,
    LEVEL,
    OBLIQUE,
    STOP,
    alphabet,
    rhyme_book,
)

MARK_TONE = 4  # a mark has no tone and fits no pattern, not even *
ALL_RHYMES = (1 << 32) - 1
NONE = np.zeros(0, np.int32)
_TONES = {"P": LEVEL, "Z": OBLIQUE, "*": LEVEL | OBLIQUE}


@dataclass(frozen=True)
class Slot:
    """One place of a poem.

    Args:
        marks: bits of the marks that may stand here; 0 where a letter stands.
        may_skip: whether it may be left out.
        line: which line, from 0.
        place: which letter of it, from 0.
        ends_line: whether it is the line's last letter.
    """

    line: int
    marks: int = 0
    may_skip: bool = False
    place: int = 0
    ends_line: bool = False


class Path(NamedTuple):
    """What a poem's beginning has come to under one scheme.

    Args:
        scheme: which.
        fits: bits of the patterns that the present line still fits.
        rhymes: bits of the rhymes that all rhyming lines so far share.
        used: letters that rhymed already; none does twice.
    """

    scheme: int
    fits: int
    rhymes: int
    used: tuple[int, ...] = ()


class Place(NamedTuple):
    """How far a poem has come: at which slot, and on which paths."""

    slot: int
    paths: tuple[Path, ...]


class VerseRules:
    """The machine of one form.

    Args:
        form: what the poem must be like.
        spellable: bool [letters], the letters that the tokenizer can write.

    Raises:
        ConfigError: nothing can fulfil the form.
    """

    def __init__(self, form: VerseForm, spellable: npt.NDArray[np.bool_]) -> None:
        self.form, self.spellable = form, spellable
        self.slots = _slots(form)
        self.end = len(self.slots)
        self.marks = alphabet().marks
        book = rhyme_book(form.book)
        self.tones = np.where(self.marks > 0, np.uint8(MARK_TONE), book.tones)
        self.schemes = _with_heads(form, self.tones)
        most = max((sum(scheme.rhyming) for scheme in self.schemes), default=0)
        self.rhymes = _rich_enough(book.level_rhymes if form.regulated else book.rhymes, spellable, most)
        self._of_rhyme = {
            1 << rhyme: np.flatnonzero((self.rhymes >> np.uint32(rhyme) & 1) * spellable).astype(np.int32)
            for rhyme in range(len(book.names))
        }
        self.heads = [-1 if not form.heads else alphabet().number[letter] for letter in form.heads]
        # [schemes][slots, tones]: which patterns of the line take a letter of these tones at this slot.
        self.fits = [self._fits(scheme) for scheme in self.schemes]
        self.begun = self._begin()

    def _fits(self, scheme: Scheme) -> npt.NDArray[np.uint8]:
        table = np.zeros((self.end, MARK_TONE + 1), np.uint8)
        for number, slot in enumerate(self.slots):
            for bit, pattern in enumerate(scheme.patterns[slot.line] if not slot.marks else ()):
                wanted = pattern[slot.place]
                for tones in range(MARK_TONE):
                    if tones & _TONES[wanted] or wanted == "*":
                        table[number, tones] |= 1 << bit
        return table

    def _begin(self) -> Place:
        paths = [Path(i, self.all_patterns(i, 0), ALL_RHYMES) for i in range(len(self.schemes))]
        place: Place | None = Place(0, tuple(paths))
        for number, letter in enumerate(self.form.begin):
            assert place is not None
            place = self.step(place, alphabet().number.get(letter, -1))
            if place is None:
                shown = f"{self.form.begin[:number]}[{letter}]{self.form.begin[number + 1 :]}"
                raise ConfigError(
                    f"verse begin is {shown}: the form does not allow the letter in brackets."
                )
        assert place is not None
        if place.slot == self.end:
            raise ConfigError(f"verse begin is {self.form.begin!r}: that is a whole poem already.")
        return place

    def all_patterns(self, scheme: int, line: int) -> int:
        """Bits of every pattern of a line; 1 after the last line."""
        patterns = self.schemes[scheme].patterns
        return (1 << len(patterns[line])) - 1 if line < len(patterns) else 1

    def is_rhyme(self, scheme: int, slot: Slot) -> bool:
        """Whether the letter there rhymes."""
        return slot.ends_line and self.schemes[scheme].rhyming[slot.line]

    def view(self, scheme: int, slot: int, fits: int, letters: int, is_exact: bool) -> Hashable:
        """What a path asks for from a slot on, as far as so many letters reach: the same is the same.

        Args:
            scheme: of the path.
            slot: where it stands.
            fits: bits of the patterns that the present line fits.
            letters: how many are looked at.
            is_exact: whether the same also says the same by the same bits.
        """
        looks: list[Hashable] = [fits if is_exact else None]
        line = -1  # that of the first letter, to which ``fits`` belongs
        number, is_one = slot, letters == 1 and not is_exact  # of one letter it only matters if it fits
        while number < self.end and letters:
            at = self.slots[number]
            letters -= not at.may_skip
            line = at.line if line < 0 and not at.marks else line
            row = self.fits[scheme][number]
            if at.line == line and not is_exact:
                row = row & np.uint8(fits)
            looks.append((at.marks, at.may_skip, self.is_rhyme(scheme, at)))
            looks.append((row > 0 if is_one else row).tobytes())
            looks.append(self.heads[at.line] if self.heads and not at.marks and at.place == 0 else None)
            looks.append(self.all_patterns(scheme, at.line + 1) if at.ends_line and letters else 0)
            number += 1
        return tuple(looks)

    def step(self, place: Place, letter: int) -> Place | None:
        """Go on by one letter or mark; ``None`` if the form does not allow it."""
        if place.slot == self.end or letter < 0:
            return None
        slot = self.slots[place.slot]
        if slot.marks:
            if self.marks[letter] & slot.marks:
                return Place(place.slot + 1, place.paths)
            return self.step(Place(place.slot + 1, place.paths), letter) if slot.may_skip else None
        if slot.place == 0 and self.heads and self.heads[slot.line] != letter:
            return None
        stepped = [self._step_path(path, place.slot, letter) for path in place.paths]
        paths = tuple(path for path in stepped if path is not None)
        return Place(place.slot + 1, paths) if paths else None

    def _step_path(self, path: Path, number: int, letter: int) -> Path | None:
        slot = self.slots[number]
        fits = path.fits & int(self.fits[path.scheme][number, self.tones[letter]])
        if not fits:
            return None
        if self.is_rhyme(path.scheme, slot):
            rhymes = path.rhymes & int(self.rhymes[letter])
            if not rhymes or letter in path.used:
                return None
            path = path._replace(rhymes=rhymes, used=(*path.used, letter))
        if slot.ends_line:
            fits = self.all_patterns(path.scheme, slot.line + 1)
        return path._replace(fits=fits)

    def letters_after(self, place: Place) -> npt.NDArray[np.int32]:
        """int32: the numbers of those that may come next, of those the tokenizer can write."""
        found = [NONE]
        for number in range(place.slot, self.end):
            slot = self.slots[number]
            if not slot.marks:
                found += [self._letters_of(path, number) for path in place.paths]
                break
            found.append(np.flatnonzero(self.marks & slot.marks * self.spellable).astype(np.int32))
            if not slot.may_skip:
                break
        return np.concatenate(found)

    def _letters_of(self, path: Path, number: int) -> npt.NDArray[np.int32]:
        """The letters that one path takes at a letter's slot."""
        slot = self.slots[number]
        fitting = (self.fits[path.scheme][number] & path.fits) > 0
        if self.is_rhyme(path.scheme, slot):
            some = [letters for bit, letters in self._of_rhyme.items() if path.rhymes & bit]
            letters = np.concatenate([NONE, *some])
            letters = letters[fitting[self.tones[letters]]]
            for used in path.used:
                letters = letters[letters != used]
        else:
            letters = np.flatnonzero(fitting[self.tones] & self.spellable).astype(np.int32)
        if slot.place == 0 and self.heads:
            letters = letters[letters == self.heads[slot.line]]
        return letters


def _slots(form: VerseForm) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    last = len(form.lines) - 1
    for line, length in enumerate(form.lines):
        slots += [Slot(line, place=i, ends_line=i == length - 1) for i in range(length)]
        if form.layout == "bare":
            slots += [Slot(line, marks=BREAK)] if line < last else []
            continue
        slots.append(Slot(line, marks=STOP if line == last or line % 2 else COMMA))
        slots += [Slot(line, marks=BREAK, may_skip=True)] if line < last else []
    return tuple(slots)


def _with_heads(form: VerseForm, tones: npt.NDArray[np.uint8]) -> list[Scheme]:
    """The schemes that the given first letters leave, each with the patterns they leave."""
    schemes = form.schemes()
    if not form.heads:
        return schemes
    number = alphabet().number
    strange = [letter for letter in form.heads if number.get(letter, -1) < 0 or tones[number[letter]] > 3]
    if strange:
        raise ConfigError(f"verse heads is {form.heads!r}: {strange[0]!r} is no Chinese character.")
    found = []
    for scheme in schemes:
        lines = [
            tuple(p for p in patterns if p[0] == "*" or tones[number[head]] & _TONES[p[0]])
            for head, patterns in zip(form.heads, scheme.patterns)
        ]
        if all(lines):
            found.append(replace(scheme, patterns=tuple(lines)))
    if not found:
        raise ConfigError(f"verse heads is {form.heads!r}: no tone pattern of the form begins like that.")
    return found


def _rich_enough(
    rhymes: npt.NDArray[np.uint32], spellable: npt.NDArray[np.bool_], needed: int
) -> npt.NDArray[np.uint32]:
    """The rhymes without those that have too few letters for a whole poem."""
    bits = np.uint32(0)
    for rhyme in range(32):
        bit = np.uint32(1 << rhyme)
        if int(((rhymes & bit) > 0)[spellable].sum()) >= needed:
            bits |= bit
    if needed and not bits:
        raise ConfigError("the tokenizer has too few Chinese characters for a poem with this rhyme.")
    return rhymes & bits

"""Which tokens of a vocabulary may go on with a poem, found for all of them at once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtnlg.generation.constraints.verse.rules import MARK_TONE, Path, Place, VerseRules
from mtnlg.generation.constraints.verse.tokens import Ints, TokenTable, VerseTokens, beginnings

MOST_KEPT_MASKS = 1024
Bools = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint8]
Rhymes = npt.NDArray[np.uint32]


class VerseMasks:
    """Masks of one form and one vocabulary; those that come again are kept.

    Args:
        rules: the form.
        tokens: the vocabulary.
    """

    def __init__(self, rules: VerseRules, tokens: VerseTokens) -> None:
        self.rules, self.tokens = rules, tokens
        self._kept: OrderedDict[object, Ints] = OrderedDict()
        self._tones: dict[bytes, Bits] = {}

    def mask(self, place: Place, pending: bytes) -> Ints:
        """int32 [ceil(vocab / 32)]: the tokens that may come next, as packed bits."""
        key = (pending, place.slot, tuple(self._what_matters(path, place.slot) for path in place.paths))
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._make(place, pending)
            if len(self._kept) > MOST_KEPT_MASKS:
                self._kept.popitem(last=False)
        return found

    def _what_matters(self, path: Path, slot: int) -> Path:
        """The path without its rhyme, where no token reaches as far as the next one."""
        near = self.rules.slots[slot : slot + self.tokens.most_letters + 1]
        if any(self.rules.is_rhyme(path.scheme, slot) for slot in near):
            return path
        return path._replace(rhymes=0, used=())

    def _make(self, place: Place, pending: bytes) -> Ints:
        table = self.tokens.table(pending)
        tones = self._tones.get(pending)
        if tones is None:
            tones = self._tones[pending] = self.rules.tones[table.letters]
        allowed = np.zeros(len(table.tokens), bool)
        for path in place.paths if table.num_lettered else ():
            _Walk(self.rules, table, tones, path, allowed).go(place.slot)
        if table.counts.size and table.counts[-1] == 0:  # tokens of a tail alone
            rows = np.flatnonzero(table.counts == 0)
            allowed[rows] = _may_begin(self.rules, table, rows, place)
        bits = np.zeros(-(-self.tokens.vocab_size // 32) * 32, bool)
        bits[table.tokens[allowed]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


class _Walk:
    """All tokens of a table, taken letter by letter along one path.

    Args:
        rules: the form.
        table: the tokens.
        tones: uint8 [rows, most letters] of their letters.
        path: where the poem stands.
        allowed: bool [rows], set where a token can be taken.
    """

    def __init__(
        self, rules: VerseRules, table: TokenTable, tones: Bits, path: Path, allowed: Bools
    ) -> None:
        self.rules, self.table, self.tones, self.path, self.allowed = rules, table, tones, path, allowed

    def go(self, slot: int) -> None:
        """Take every token that has a letter, from this slot on.

        Most tokens fall at their first letter, so that one is looked at in whole columns.
        """
        firsts = self.tones[: self.table.num_lettered, 0]
        at = self.rules.slots[slot]
        if at.marks:
            taken = firsts >= MARK_TONE
            if at.may_skip:
                taken |= self._fitting(slot + 1)[firsts]
        else:
            taken = self._fitting(slot)[firsts]
        rows = np.flatnonzero(taken)
        self._take(_Rows(rows, np.full(len(rows), self.path.fits, np.uint8)), 0, slot)

    def _fitting(self, slot: int) -> Bools:
        """bool [tones]: which tones the path's patterns take at a letter's slot."""
        return (self.rules.fits[self.path.scheme][slot] & np.uint8(self.path.fits)) > 0

    def _take(self, taken: _Rows, column: int, slot: int) -> None:
        """Take the letter in ``column`` of these rows at a slot of the poem."""
        if not len(taken.rows) or slot == self.rules.end:
            return
        at, scheme = self.rules.slots[slot], self.path.scheme
        if at.marks:
            is_mark = (self.rules.marks[self.table.letters[taken.rows, column]] & at.marks) > 0
            if at.may_skip:
                self._take(taken.where(~is_mark), column, slot + 1)
            self._next(taken.where(is_mark), column + 1, slot + 1)
            return
        taken.fits = taken.fits & self.rules.fits[scheme][slot][self.tones[taken.rows, column]]
        taken = taken.where(taken.fits > 0)
        if at.place == 0 and self.rules.heads:
            letters = self.table.letters[taken.rows, column]
            taken = taken.where(letters == self.rules.heads[at.line])
        if self.rules.is_rhyme(scheme, at):
            taken = self._rhyming(taken, self.table.letters[taken.rows, column])
        if at.ends_line:
            taken.fits = np.full(len(taken.rows), self.rules.all_patterns(scheme, at.line + 1), np.uint8)
        self._next(taken, column + 1, slot + 1)

    def _rhyming(self, taken: _Rows, letters: Ints) -> _Rows:
        shared = np.uint32(self.path.rhymes) if taken.rhymes is None else taken.rhymes
        rhymes = self.rules.rhymes[letters] & shared
        kept = rhymes > 0
        for used in self.path.used:
            kept &= letters != used
        if taken.own is not None:
            kept &= letters != taken.own
        return _Rows(taken.rows[kept], taken.fits[kept], rhymes[kept], letters[kept])

    def _next(self, taken: _Rows, column: int, slot: int) -> None:
        """File the tokens that are used up; go on with the others."""
        done = self.table.counts[taken.rows] == column
        ended = taken.where(done)
        tails = self.table.tails[ended.rows]
        self.allowed[ended.rows[tails == 0]] = True
        for i in np.flatnonzero(tails):
            self._try_tail(ended, i, slot)
        if len(ended.rows) < len(taken.rows):
            self._take(taken.where(~done), column, slot)

    def _try_tail(self, ended: _Rows, i: np.intp, slot: int) -> None:
        row, path = ended.rows[i], self.path
        if self.allowed[row]:
            return
        if ended.rhymes is not None and ended.own is not None:
            path = path._replace(rhymes=int(ended.rhymes[i]), used=(*path.used, int(ended.own[i])))
        place = Place(slot, (path._replace(fits=int(ended.fits[i])),))
        self.allowed[row] = bool(_may_begin(self.rules, self.table, np.array([row]), place)[0])


@dataclass
class _Rows:
    """Tokens that are being taken letter by letter.

    Args:
        rows: which of the table.
        fits: of each, the patterns of its present line that it still fits.
        rhymes: of each, the rhymes that are left; ``None`` while they are the path's.
        own: of each, the letter of its own that rhymed last; ``None`` while it has none.
    """

    rows: npt.NDArray[np.intp]
    fits: Bits
    rhymes: Rhymes | None = None
    own: Ints | None = None

    def where(self, kept: Bools) -> _Rows:
        """Some of them."""
        rhymes = None if self.rhymes is None else self.rhymes[kept]
        own = None if self.own is None else self.own[kept]
        return _Rows(self.rows[kept], self.fits[kept], rhymes, own)


def _may_begin(rules: VerseRules, table: TokenTable, rows: npt.NDArray[np.intp], place: Place) -> Bools:
    """Which of the rows' tails begin a letter that may come next."""
    begun = beginnings().of(rules.letters_after(place))
    return begun[table.tail_numbers[table.tails[rows]]]

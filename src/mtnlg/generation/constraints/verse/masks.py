"""Which tokens of a vocabulary may go on with a poem, found for all of them at once."""

from __future__ import annotations

from collections import OrderedDict

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
        fits = np.full(len(rows), self.path.fits, np.uint8)
        rhymes = np.full(len(rows), self.path.rhymes, np.uint32)
        self._take(rows, 0, slot, fits, rhymes, np.full(len(rows), -1, np.int32))

    def _fitting(self, slot: int) -> Bools:
        """bool [tones]: which tones the path's patterns take at a letter's slot."""
        return (self.rules.fits[self.path.scheme][slot] & np.uint8(self.path.fits)) > 0

    def _take(
        self, rows: npt.NDArray[np.intp], column: int, slot: int, fits: Bits, rhymes: Rhymes, own: Ints
    ) -> None:
        """Take the letter in ``column`` of these rows; ``own`` is the token's own last rhyming letter."""
        if not len(rows) or slot == self.rules.end:
            return
        letters, at = self.table.letters[rows, column], self.rules.slots[slot]
        if at.marks:
            is_mark = (self.rules.marks[letters] & at.marks) > 0
            if at.may_skip:
                rest = ~is_mark
                self._take(rows[rest], column, slot + 1, fits[rest], rhymes[rest], own[rest])
            self._next(rows[is_mark], column + 1, slot + 1, fits[is_mark], rhymes[is_mark], own[is_mark])
            return
        scheme = self.path.scheme
        fits = fits & self.rules.fits[scheme][slot][self.tones[rows, column]]
        kept = fits > 0
        if at.place == 0 and self.rules.heads:
            kept &= letters == self.rules.heads[at.line]
        rows, letters, fits, rhymes, own = rows[kept], letters[kept], fits[kept], rhymes[kept], own[kept]
        if self.rules.is_rhyme(scheme, at):
            rhymes = rhymes & self.rules.rhymes[letters]
            kept = (rhymes > 0) & (letters != own) & ~np.isin(letters, self.path.used)
            rows, fits, rhymes, own = rows[kept], fits[kept], rhymes[kept], letters[kept]
        if at.ends_line:
            fits = np.full(len(rows), self.rules.all_patterns(scheme, at.line + 1), np.uint8)
        self._next(rows, column + 1, slot + 1, fits, rhymes, own)

    def _next(
        self, rows: npt.NDArray[np.intp], column: int, slot: int, fits: Bits, rhymes: Rhymes, own: Ints
    ) -> None:
        """File the tokens that are used up; go on with the others."""
        done = self.table.counts[rows] == column
        ended, tails = rows[done], self.table.tails[rows[done]]
        self.allowed[ended[tails == 0]] = True
        for i in np.flatnonzero(done)[tails > 0]:
            self._try_tail(rows[i], slot, int(fits[i]), int(rhymes[i]), int(own[i]))
        rest = ~done
        if rest.any():
            self._take(rows[rest], column, slot, fits[rest], rhymes[rest], own[rest])

    def _try_tail(self, row: int, slot: int, fits: int, rhymes: int, own: int) -> None:
        if self.allowed[row]:
            return
        used = self.path.used if own < 0 else (*self.path.used, own)
        place = Place(slot, (Path(self.path.scheme, fits, rhymes, used),))
        self.allowed[row] = bool(_may_begin(self.rules, self.table, np.array([row]), place)[0])


def _may_begin(rules: VerseRules, table: TokenTable, rows: npt.NDArray[np.intp], place: Place) -> Bools:
    """Which of the rows' tails begin a letter that may come next."""
    found = beginnings()
    letters = rules.letters_after(place)
    begun = np.zeros(len(found.numbers), bool)
    for places, prefixes in found.of_letters:
        begun[prefixes[letters[places]]] = True
    begun[0] = False  # no tail
    return begun[table.tail_numbers[table.tails[rows]]]

"""Which tokens of a vocabulary may go on with a poem, as packed bits.

Making a mask by looking at every token takes half a millisecond, and hardly two poems come by the same
rhymes. But most of a mask does not depend on them: only tokens with a letter at a rhyming place do. So a
mask is put together of parts (``walk.py``), made once for each place of a form, and of the rhymes to keep.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.constraints.kept import Kept
from mtnlg.generation.constraints.verse.rules import Path, Place, VerseRules
from mtnlg.generation.constraints.verse.tokens import Ints, TokenTable, VerseTokens, beginnings
from mtnlg.generation.constraints.verse.walk import Part, Walk, packed, set_bits

Bools = npt.NDArray[np.bool_]


class VerseMasks:
    """Masks of one form and one vocabulary.

    Args:
        rules: the form.
        tokens: the vocabulary.
    """

    def __init__(self, rules: VerseRules, tokens: VerseTokens) -> None:
        self.rules, self.tokens = rules, tokens
        self._num_words = -(-tokens.vocab_size // 32)
        self._masks: Kept[Ints] = Kept()
        self._parts: Kept[Part] = Kept()
        self._rhymes: Kept[Ints] = Kept()
        self._beginnings: Kept[Bools] = Kept()
        self._numbers: dict[Hashable, int] = {}  # of what different places look like
        self._views: dict[tuple[int, int, int, int, bool], int] = {}
        self._tones: dict[bytes, npt.NDArray[np.uint8]] = {}
        self._num_parts = 0

    def mask(self, place: Place, pending: bytes) -> Ints:
        """The tokens that may come next.

        Returns:
            int32 [ceil(vocab / 32)] of packed bits, not to be changed.

        Raises:
            MtnlgError: there is none.
        """
        parts = [self._part(place.slot, path, pending) for path in place.paths]
        key = tuple(
            (part.number, path.rhymes, path.used) if part.is_rhyming else part.number
            for part, path in zip(parts, place.paths)
        )
        return self._masks.get(key, lambda: self._joined(place, parts))

    def _joined(self, place: Place, parts: list[Part]) -> Ints:
        words = np.zeros(self._num_words, np.int32)
        for path, part in zip(place.paths, parts):
            words |= self._with_rhymes(place.slot, path, part) if part.is_rhyming else part.free
        if not words.any():
            raise MtnlgError("the tokenizer has no token that this verse could go on with.")
        return words

    # -- parts

    def _part(self, slot: int, path: Path, pending: bytes) -> Part:
        table = self.tokens.table(pending)
        has_tails = len(table.tail_numbers) > 1
        key = (pending, self._view(slot, path, table.letters.shape[1] + has_tails, has_tails))
        return self._parts.get(key, lambda: self._make_part(slot, path, pending))

    def _view(self, slot: int, path: Path, letters: int, is_exact: bool = False) -> int:
        """A number for what a path asks for from a slot on, as far as so many letters reach."""
        key = (path.scheme, slot, path.fits, letters, is_exact)
        view = self._views.get(key)
        if view is None:
            looks = self.rules.view(path.scheme, slot, path.fits, letters, is_exact)
            view = self._views[key] = self._numbers.setdefault(looks, len(self._numbers))
        return view

    def _make_part(self, slot: int, path: Path, pending: bytes) -> Part:
        table = self.tokens.table(pending)
        tones = self._tones.get(pending)
        if tones is None:
            tones = self._tones[pending] = self.rules.tones[table.letters]
        self._num_parts += 1
        walk = Walk(self.rules, table, tones, path.scheme, self.begun)
        return walk.go(slot, path.fits, self._num_words, self._num_parts)

    def begun(self, slot: int, path: Path) -> Bools:
        """bool [beginnings]: which of them begin a letter that may come next."""
        key = (self._view(slot, path, 1), path.rhymes, path.used)
        return self._beginnings.get(
            key, lambda: beginnings().of(self.rules.letters_after(Place(slot, (path,))))
        )

    # -- rhymes

    def _with_rhymes(self, slot: int, path: Path, part: Part) -> Ints:
        words = self._rhyming(path, part) | part.free
        for tail in part.tails:
            begun = self.begun(slot + tail.offset, path._replace(fits=tail.fits))
            set_bits(words, tail.tokens[begun[tail.numbers]])
        if len(part.hard):
            fitting = [self._fits(Place(slot, (path,)), part.table, row) for row in part.hard.tolist()]
            set_bits(words, part.table.tokens[part.hard[fitting]])
        return words

    def _rhyming(self, path: Path, part: Part) -> Ints:
        """The tokens whose one rhyming letter keeps the rhyme and did not rhyme before."""
        shared = path.rhymes & part.rhymes
        words = np.zeros(self._num_words, np.int32)
        for rhyme in range(shared.bit_length()):
            if shared >> rhyme & 1:
                words |= self._of_rhyme(part, rhyme)
        for letter in path.used:
            first, last = part.letters.searchsorted([letter, letter + 1])
            for token in part.tokens[first:last].tolist():
                words[token >> 5] &= ~np.uint32(1 << (token & 31)).view(np.int32)
        return words

    def _of_rhyme(self, part: Part, rhyme: int) -> Ints:
        def make() -> Ints:
            kept = (self.rules.rhymes[part.letters] >> np.uint32(rhyme) & 1) > 0
            return packed(part.tokens[kept], self._num_words)

        return self._rhymes.get((part.number, rhyme), make)

    def _fits(self, place: Place, table: TokenTable, row: int) -> bool:
        """Whether one token can be taken, letter by letter."""
        found: Place | None = place
        for letter in table.letters[row, : table.counts[row]].tolist():
            found = None if found is None else self.rules.step(found, letter)
        tail = table.tails[row]
        if found is None or not tail:
            return found is not None
        return bool(self.begun(found.slot, found.paths[0])[table.tail_numbers[tail]])

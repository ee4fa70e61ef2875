"""Guessing that a text goes on as it did after the same few tokens before (prompt lookup).

Costs no model at all. It pays where answers repeat their prompt or themselves: summaries, code that is
edited, extraction, tables. Where the last tokens never stood together before, there is no guess, and a
step is what it is without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from mtnlg.generation.scheduler import Draft, Running


class NgramIndex:
    """Where each n-gram of one sequence last stood.

    Args:
        smallest: tokens of the shortest n-gram that counts.
        largest: of the longest.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = smallest, largest
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → place of the token that followed it

    def extend(self, ids: Sequence[int]) -> None:
        """Take in what the sequence has beyond what is known."""
        for place in range(len(self._ids), len(ids)):
            # The n-grams that end before this token have now been followed by something.
            for size in range(self.smallest, min(self.largest, place) + 1):
                self._after[tuple(ids[place - size : place])] = place
            self._ids.append(ids[place])

    def guess(self, count: int) -> list[int]:
        """At most so many tokens, as they followed the longest ending that stood somewhere before."""
        ids = self._ids
        for size in range(min(self.largest, len(ids)), self.smallest - 1, -1):
            place = self._after.get(tuple(ids[-size:]))
            if place is not None:
                # Past the end it goes on with its own guess: what repeats with a period does so again.
                found: list[int] = []
                for i in range(place, place + count):
                    found.append(ids[i] if i < len(ids) else found[i - len(ids)])
                return found
        return []


class NgramDrafter:
    """Guesses from each sequence's own past; see ``Drafter``.

    Args:
        num_tokens: guessed at a time.
        smallest: tokens of the shortest ending that is looked up.
        largest: of the longest, which is tried first.
    """

    def __init__(self, num_tokens: int = 4, smallest: int = 2, largest: int = 4) -> None:
        self.num_tokens, self.smallest, self.largest = num_tokens, smallest, largest
        self._indices: WeakKeyDictionary[Running, NgramIndex] = WeakKeyDictionary()

    def draft(self, entries: Sequence[Running]) -> list[Draft]:
        """A guess for each request; empty where its ending is new."""
        drafts = []
        for entry in entries:
            index = self._indices.get(entry)
            if index is None:
                index = self._indices[entry] = NgramIndex(self.smallest, self.largest)
            index.extend(entry.ids)
            drafts.append(Draft(index.guess(self.num_tokens)))
        return drafts

    def forget(self, entry: Running) -> None:
        """A request has ended."""
        self._indices.pop(entry, None)

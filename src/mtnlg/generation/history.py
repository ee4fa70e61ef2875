"""What a sequence has said so far, kept up to date token by token for the rules that look back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """The different tokens of a sequence, and how often each was generated.

    Args:
        prompt_ids: they are among the different tokens, with no count.
    """

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token in prompt_ids:
            self._place_of(token)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """[different tokens] in the order in which they came."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[different tokens] how often each was generated."""
        return self._counts[: len(self._place)]

    @property
    def addresses(self) -> tuple[int, int]:
        """Of :attr:`ids` and :attr:`counts`, until the next token is accepted."""
        return self._ids.ctypes.data, self._counts.ctypes.data

    def accept(self, token: int) -> None:
        """Count a generated token."""
        place = self._place_of(token)  # first, because it may make the arrays larger
        self._counts[place] += 1

    def copy(self) -> TokenCounts:
        """The same counts, to go on from in another way."""
        other = TokenCounts()
        other._place = dict(self._place)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    def _place_of(self, token: int) -> int:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
        return place


class NgramHistory:
    """Which tokens would complete an n-gram that the sequence holds already.

    Args:
        size: tokens of an n-gram.
        ids: the sequence so far.
    """

    def __init__(self, size: int, ids: Sequence[int] = ()) -> None:
        self.size = size
        self._tail: tuple[int, ...] = ()  # the last size - 1 tokens
        self._length = 0
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}
        for token in ids:
            self.accept(token)

    @property
    def banned(self) -> tuple[int, ...]:
        """Tokens that may not come next."""
        return self._followers.get(self._tail, ())

    def accept(self, token: int) -> None:
        """Go on by a token."""
        self._length += 1
        if self._length >= self.size:
            known = self._followers.get(self._tail, ())
            if token not in known:
                self._followers[self._tail] = (*known, token)
        if self.size > 1:
            self._tail = (*self._tail, token)[-(self.size - 1) :]

    def copy(self) -> NgramHistory:
        """The same history, to go on from in another way."""
        other = NgramHistory(self.size)
        other._tail, other._length = self._tail, self._length
        other._followers = dict(self._followers)
        return other

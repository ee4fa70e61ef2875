"""Which corpus each sample comes from: exact shares at every step, for any number of samples.

The j-th sample of a corpus with share w is put into steps ceil(j/w) or earlier and no earlier than
floor((j-1)/w) + 1; among the corpora that may go now, the one with the earliest such deadline goes
(the chairman assignment problem: Tijdeman 1980; Steiner and Yeomans 1993). Every step then has each
corpus within one sample of its share. The largest-deficit rule of Megatron-LM does not guarantee that
(MT-NLG's own blend goes to 1.05 with it).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

BLOCK = 65_536
_BLOCKS_KEPT = 4


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in exactly the proportions of ``weights`` as they are written in decimals.

    Raises:
        ValueError: a weight is not a positive finite number.
    """
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"blend weights must be positive numbers, got {list(weights)}")
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * denominator) for fraction in exact]
    divisor = gcd(*whole)
    return [value // divisor for value in whole]


def schedule(weights: Sequence[int], taken: Sequence[int], length: int) -> np.ndarray:
    """The next ``length`` corpus numbers after ``taken`` samples of each corpus: uint16 [length]."""
    total, count = sum(weights), len(weights)
    step = sum(taken) + 1
    done = list(taken)
    # A heap entry is time * count + corpus: compared by time, ties to the lowest corpus.
    waiting = [(done[c] * total // weights[c] + 1) * count + c for c in range(count)]
    heapq.heapify(waiting)
    ready: list[int] = []
    chosen = []
    for now in range(step, step + length):
        released = (now + 1) * count
        while waiting and waiting[0] < released:
            corpus = heapq.heappop(waiting) % count
            deadline = -(-(done[corpus] + 1) * total // weights[corpus])
            heapq.heappush(ready, deadline * count + corpus)
        corpus = heapq.heappop(ready) % count
        chosen.append(corpus)
        done[corpus] += 1
        heapq.heappush(waiting, (done[corpus] * total // weights[corpus] + 1) * count + corpus)
    return np.array(chosen, dtype=np.uint16)


class Blend:
    """The endless sequence of (corpus, number of the sample inside the corpus).

    It repeats after the sum of the integer weights (100,000 samples for weights of five digits), so
    any position is found at once. Weights of longer decimals are computed block by block, and only
    the counts at the start of each block are kept.

    Args:
        weights: share of each corpus; normalised here.
        starts: counts of samples at the starts of blocks computed before, int64 [blocks, corpora].

    Raises:
        ValueError: a weight is not a positive finite number, or there are more than 65,535 corpora.
    """

    def __init__(self, weights: Sequence[float], starts: np.ndarray | None = None) -> None:
        if len(weights) > 65_535:
            raise ValueError(f"a blend holds at most 65535 corpora, got {len(weights)}")
        self.weights = integer_weights(weights)
        self.period = sum(self.weights)
        first = np.zeros(len(weights), dtype=np.int64)
        self._starts = [first] if starts is None else [np.asarray(row) for row in starts]
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def block_starts(self) -> np.ndarray:
        """Samples of each corpus before each block known so far: int64 [blocks, corpora]."""
        return np.stack(self._starts)

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus numbers, uint16 [count], and sample numbers inside them, int64 [count]."""
        corpora = np.empty(count, dtype=np.uint16)
        numbers = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            cycle, inside = divmod(start + filled, self.period)
            block, offset = divmod(inside, BLOCK)
            corpus, number = self._block(block)
            piece = min(count - filled, len(corpus) - offset)
            part = slice(filled, filled + piece)
            corpora[part] = corpus[offset : offset + piece]
            numbers[part] = number[offset : offset + piece]
            if cycle:
                numbers[part] += cycle * np.array(self.weights, dtype=np.int64)[corpora[part]]
            filled += piece
        return corpora, numbers

    def counts(self, num_samples: int) -> np.ndarray:
        """Samples of each corpus among the first ``num_samples``: int64 [corpora]."""
        cycles, inside = divmod(num_samples, self.period)
        block, offset = divmod(inside, BLOCK)
        counts = self._start(block).copy()
        if cycles:
            counts += cycles * np.array(self.weights, dtype=np.int64)
        if offset:
            counts += np.bincount(self._block(block)[0][:offset], minlength=len(self.weights))
        return counts

    def _start(self, block: int) -> np.ndarray:
        while len(self._starts) <= block:
            self._extend()
        return self._starts[block]

    def _extend(self) -> None:
        block = len(self._starts) - 1
        corpus, _ = self._block(block)
        self._starts.append(self._starts[block] + np.bincount(corpus, minlength=len(self.weights)))

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        taken = self._start(block)
        length = min(BLOCK, self.period - block * BLOCK)
        if len(self.weights) == 1:
            corpus = np.zeros(length, dtype=np.uint16)
        else:
            corpus = schedule(self.weights, taken.tolist(), length)
        self._blocks[block] = corpus, _ranks(corpus, taken)
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return self._blocks[block]


def _ranks(corpus: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The how-manieth sample of its corpus each entry of a block is, int64 [block]."""
    order = np.argsort(corpus, kind="stable")
    sizes = np.bincount(corpus, minlength=len(taken))
    firsts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(corpus), dtype=np.int64)
    ranks[order] = np.arange(len(corpus)) - np.repeat(firsts - taken, sizes)
    return ranks

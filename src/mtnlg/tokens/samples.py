"""The samples of one split of one corpus, by number: shuffled and endless, or fixed and once.

A sample is a list of runs, (first token, tokens) pairs of the token file, one for each document it
touches, ``sequence_length + 1`` tokens in all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from mtnlg.tokens.index_cache import Arrays, IndexCache
from mtnlg.tokens.sample_index import document_order, epoch_of, first_sample, sample_order, sample_starts
from mtnlg.tokens.split import Part

Runs = tuple[np.ndarray, np.ndarray]
CACHED_FROM = 16_384  # entries; smaller indices are built faster than they are read
_EPOCHS_KEPT = 8


class PackedSamples:
    """Training's samples: every epoch has its own order of documents and of samples.

    Args:
        part: the split to read.
        sequence_length: tokens of a sample less one.
        key: text that the shuffles are seeded with.
        cache: where the indices of large epochs are kept.
    """

    def __init__(self, part: Part, sequence_length: int, key: str, cache: IndexCache) -> None:
        self.part, self.sequence_length = part, sequence_length
        self._key, self._cache = key, cache
        self._kept: OrderedDict[tuple[str, int], Arrays] = OrderedDict()
        self._large = len(part.lengths) + part.num_tokens // sequence_length >= CACHED_FROM

    def samples_before(self, epoch: int) -> int:
        """Samples of all epochs before ``epoch``."""
        return first_sample(epoch, self.part.num_tokens, self.sequence_length)

    def epochs(self, num_samples: int) -> float:
        """How often the part's tokens are read by the first ``num_samples`` samples."""
        return num_samples * self.sequence_length / self.part.num_tokens

    def build(self, num_samples: int) -> None:
        """Compute and cache what the first ``num_samples`` samples read."""
        if not self._large:
            return
        last = epoch_of(num_samples - 1, self.part.num_tokens, self.sequence_length)
        for epoch in range(last + 1):
            self.index(epoch)
        self.documents(last + 1)  # for the sample over the end of the last epoch

    def runs(self, number: int) -> Runs:
        """The runs of sample ``number``: int64 [documents] each, first tokens and counts."""
        epoch = epoch_of(number, self.part.num_tokens, self.sequence_length)
        index = self.index(epoch)
        chosen = int(index["samples"][number - self.samples_before(epoch)])
        (first, offset), (last, end) = index["starts"][chosen : chosen + 2].tolist()
        documents = self.documents(epoch)[first : last + 1]
        begins, lengths = self.part.begins[documents], self.part.lengths[documents].astype(np.int64)
        if last < len(self.part.lengths):
            lengths[-1] = end + 1  # the first token of the next sample is the last label of this one
        begins[0] += offset
        lengths[0] -= offset
        missing = self.sequence_length + 1 - int(lengths.sum())
        if missing:
            more_begins, more_lengths = self._head(epoch + 1, missing)
            begins = np.concatenate([begins, more_begins])
            lengths = np.concatenate([lengths, more_lengths])
        return begins, lengths

    def index(self, epoch: int) -> Arrays:
        """``starts`` and ``samples`` of an epoch; see ``mtnlg.tokens.sample_index``."""

        def build() -> Arrays:
            lengths = np.asarray(self.part.lengths)[self.documents(epoch)]
            starts = sample_starts(lengths, epoch, self.sequence_length)
            return {"starts": starts, "samples": sample_order(len(starts) - 1, epoch, self._key)}

        return self._get("samples", epoch, build)

    def documents(self, epoch: int) -> np.ndarray:
        """The documents in the order of ``epoch``: [documents]."""

        def build() -> Arrays:
            return {"documents": document_order(len(self.part.lengths), epoch, self._key)}

        return self._get("order", epoch, build)["documents"]

    def _get(self, kind: str, epoch: int, build: Callable[[], Arrays]) -> Arrays:
        entry = kind, epoch
        if entry not in self._kept:
            name = f"epoch-{epoch:05d}-{kind}"
            self._kept[entry] = self._cache.get(name, build) if self._large else build()
            while len(self._kept) > 2 * _EPOCHS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(entry)
        return self._kept[entry]

    def _head(self, epoch: int, count: int) -> Runs:
        """Runs of the first ``count`` tokens from the start of ``epoch`` on."""
        pieces: list[Runs] = []
        while count >= self.part.num_tokens:  # a corpus smaller than a sample
            order = self.documents(epoch)
            pieces.append((self.part.begins[order], self.part.lengths[order].astype(np.int64)))
            count -= self.part.num_tokens
            epoch += 1
        taken = 8
        while count:
            order = self.documents(epoch)[:taken]
            lengths = self.part.lengths[order].astype(np.int64)
            ends = np.cumsum(lengths)
            if ends[-1] >= count:
                last = int(np.searchsorted(ends, count))
                lengths[last] -= int(ends[last]) - count
                pieces.append((self.part.begins[order[: last + 1]], lengths[: last + 1]))
                break
            taken *= 4
        return np.concatenate([begins for begins, _ in pieces]), np.concatenate([n for _, n in pieces])


class FixedSamples:
    """Evaluation's samples: the part from its start to its end, each token predicted once.

    The last sample may be short, and the very first token is only read.
    """

    def __init__(self, part: Part, sequence_length: int) -> None:
        self.part, self.sequence_length = part, sequence_length
        self.num_samples = -(-max(part.num_tokens - 1, 0) // sequence_length)
        self._ends = np.cumsum(np.asarray(part.lengths), dtype=np.int64) + part.start

    def runs(self, number: int) -> Runs:
        """The runs of sample ``number``: int64 [documents] each, first tokens and counts."""
        start = self.part.start + number * self.sequence_length
        stop = min(start + self.sequence_length + 1, self.part.stop)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        bounds = np.concatenate([[start], self._ends[first:last], [stop]])
        return bounds[:-1], np.diff(bounds)

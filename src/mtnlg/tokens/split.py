"""Train, validation and test: three contiguous ranges of one token file.

The cuts fall between documents, at the rounded shares of their number (as Megatron-LM cuts). A small
corpus gives every part that has a share at least one document; where even that is far from the shares
asked for (one big document, a few documents of very unequal length) the cuts fall at the shares of the
tokens instead, through the middle of a document if need be.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mtnlg.tokens.index_column import IndexColumn

Column = np.ndarray | IndexColumn
SPLITS = ("train", "validation", "test", "all")
_ALIASES = {"valid": "validation", "val": "validation"}
_LEAST_TRAIN = 0.9  # of the tokens asked for, before cuts through documents are preferred
_LEAST_HELD_OUT = 0.1


def split_name(name: str) -> str:
    """The full name of a split.

    Raises:
        ValueError: it is none of train, validation (valid), test, all.
    """
    name = _ALIASES.get(name, name)
    if name not in SPLITS:
        raise ValueError(f"split {name!r} does not exist: choose one of {', '.join(SPLITS)}.")
    return name


@dataclass(frozen=True)
class Part:
    """One split of one corpus.

    Args:
        start: first token of the part in the token file.
        stop: one past its last token.
        begins: [documents], first token of each document; cut documents begin at the cut.
        lengths: [documents], tokens of each document inside the part.
        by_documents: the cuts fall between documents.
    """

    start: int
    stop: int
    begins: Column
    lengths: Column
    by_documents: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the part."""
        return self.stop - self.start


def split_part(
    begins: Column, lengths: Column, num_tokens: int, shares: Sequence[float], split: str
) -> Part:
    """The documents of ``split``.

    Args:
        begins: [documents], first token of each document of the token file.
        lengths: [documents], tokens of each document.
        num_tokens: tokens of the token file.
        shares: of train, validation and test, summing to 1.
        split: one of ``SPLITS``.
    """
    if split == "all":
        return Part(0, num_tokens, begins, lengths, True)
    cuts, by_documents = split_cuts(begins, num_tokens, shares)
    index = SPLITS.index(split)
    return _cut_out(begins, lengths, cuts[index], cuts[index + 1], by_documents)


def split_cuts(begins: Column, num_tokens: int, shares: Sequence[float]) -> tuple[list[int], bool]:
    """The four token positions that bound the splits, and whether they fall between documents."""
    cumulative = [0.0, *accumulate(shares)]
    cumulative[-1] = 1.0
    natural = [round(share * len(begins)) for share in cumulative]
    for edges in (natural, _one_document_each(natural, shares)):
        cuts = [int(begins[edge]) if edge < len(begins) else num_tokens for edge in edges]
        if edges == sorted(edges) and _near_enough(cuts, shares):
            return cuts, True
    return _two_tokens_each([round(share * num_tokens) for share in cumulative], shares), False


def _one_document_each(edges: list[int], shares: Sequence[float]) -> list[int]:
    nudged = list(edges)
    for index in (2, 1):
        nudged[index] = min(nudged[index], nudged[index + 1] - (shares[index] > 0))
    return nudged


def _two_tokens_each(cuts: list[int], shares: Sequence[float]) -> list[int]:
    nudged = list(cuts)
    for index in (2, 1):
        nudged[index] = max(0, min(nudged[index], nudged[index + 1] - 2 * (shares[index] > 0)))
    return nudged


def _near_enough(cuts: list[int], shares: Sequence[float]) -> bool:
    asked = [share * cuts[-1] for share in shares]
    got = [stop - start for start, stop in pairwise(cuts)]
    least = (_LEAST_TRAIN, _LEAST_HELD_OUT, _LEAST_HELD_OUT)
    # Two tokens are the least: one to read and one to predict.
    return all(tokens >= max(2, floor * want) for tokens, floor, want in zip(got, least, asked) if want)


def _cut_out(begins: Column, lengths: Column, start: int, stop: int, by_documents: bool) -> Part:
    if start == stop:
        return Part(start, stop, begins[:0], lengths[:0], by_documents)
    # bisect reads a few entries of the memory map; numpy's searchsorted would copy all of it.
    first = max(bisect_right(begins, start) - 1, 0)
    last = max(bisect_left(begins, stop), first)
    begins, lengths = begins[first:last], lengths[first:last]
    if not by_documents and len(begins):
        firsts, sizes = np.array(begins, dtype=np.int64), np.array(lengths, dtype=np.int64)
        begins = np.maximum(firsts, start)
        lengths = np.minimum(firsts + sizes, stop) - begins
    return Part(start, stop, begins, lengths, by_documents)

"""Several examples in one sample: which go together, and in which order."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from mtnlg.tokens.shuffle import permutation, seed_of


def best_fit(widths: Sequence[int], length: int, order: Sequence[int]) -> list[list[int]]:
    """Fill rows of ``length``: each example goes where the least room is left that is enough.

    Args:
        widths: places that each example takes, none more than ``length``.
        length: places of a row.
        order: numbers of the examples, in the order they are placed.

    Returns:
        numbers of the examples of each row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (places left, row), ascending
    smallest = min(widths, default=0)
    for number in order:
        width = int(widths[number])
        place = bisect.bisect_left(rooms, (width, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
            rows[row].append(int(number))
        else:
            room, row = length, len(rows)
            rows.append([int(number)])
        if room - width >= smallest:
            bisect.insort(rooms, (room - width, row))
    return rows


def epoch_rows(widths: Sequence[int], length: int, packs: bool, key: str, epoch: int) -> list[list[int]]:
    """The rows of one epoch of training, every example once, shuffled by ``key`` and ``epoch`` alone."""
    order = permutation(len(widths), seed_of(key, "examples", epoch)).tolist()
    rows = best_fit(widths, length, order) if packs else [[number] for number in order]
    return [rows[row] for row in permutation(len(rows), seed_of(key, "rows", epoch)).tolist()]


def fixed_rows(widths: Sequence[int], length: int, packs: bool) -> list[list[int]]:
    """The rows of an evaluation: every example once, the longest first."""
    if not packs:
        return [[number] for number in range(len(widths))]
    order = np.argsort(-np.asarray(widths), kind="stable").tolist()
    return best_fit(widths, length, order)

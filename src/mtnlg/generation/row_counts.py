"""Few different numbers of rows, so that few programs are made for them.

oneDNN makes a program for every number of rows that it meets in a product, and keeps it, a thousand of
them. Decoding and prompts cut to fit meet nearly every number up to what a step may hold, so that a server
would take memory for hours. Rows of zeros that fill up to the next of a few numbers bound that.
"""

from __future__ import annotations

EXACT = 16  # so many rows are never filled up: there, work is to read the weights
PER_DOUBLING = 8  # numbers between one power of two and the next; at most a ninth of the rows is filling


def filled_up(count: int, fewest: int) -> int:
    """The number of rows that a product of ``count`` rows should have.

    Args:
        count: rows that are wanted.
        fewest: rows that a product should have at least; where that is 1, programs do not depend on the
            number of rows, and nothing is filled up.
    """
    if fewest == 1 or count <= EXACT:
        return max(count, fewest)
    step = 2 ** ((count - 1).bit_length() - 1) // PER_DOUBLING
    return -(-count // step) * step

"""Columns of an ``.idx`` file, read in place.

The format aligns nothing, and numpy copies the whole of an unaligned array to pick a few entries of it.
Read as rows of bytes, only the entries asked for are touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class IndexColumn:
    """A memory-mapped column of integers, as int64 where it is looked at.

    Args:
        column: [entries], unaligned or not.
        divisor: entries are divided by it (byte offsets to token numbers).
    """

    def __init__(self, column: np.ndarray, divisor: int = 1) -> None:
        self._column, self._divisor = np.asarray(column), divisor
        self._rows = self._column.view(np.uint8).reshape(-1, self._column.itemsize)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        """An integer for an integer, a column for a slice, int64 [indices] for an array of them."""
        if isinstance(index, slice):
            return IndexColumn(self._column[index], self._divisor)
        if not isinstance(index, np.ndarray):
            return int(self._column[index]) // self._divisor
        picked = self._rows[index].view(self._column.dtype)[:, 0].astype(np.int64)
        return picked if self._divisor == 1 else picked // self._divisor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self._column if self._divisor == 1 else self._column // self._divisor
        return np.array(whole, dtype=dtype)  # a copy is aligned

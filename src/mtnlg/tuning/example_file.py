"""Examples in a file: their tokens one after the other, with marks, in safetensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mtnlg.config import DataError
from mtnlg.tuning.rendering import Example


class ExampleFile:
    """The examples of one split.

    Args:
        tokens: int32, all ids.
        scored: bool, of each id.
        starts: int64 [examples + 1], where each example begins.
    """

    def __init__(self, tokens: np.ndarray, scored: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.scored, self.starts = tokens, scored, starts

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ExampleFile:
        """Of examples in memory."""
        starts = np.cumsum([0, *(len(example.ids) for example in examples)], dtype=np.int64)
        tokens = np.fromiter((i for example in examples for i in example.ids), np.int32, int(starts[-1]))
        scored = np.fromiter((s for example in examples for s in example.scored), np.bool_, int(starts[-1]))
        return cls(tokens, scored, starts)

    @classmethod
    def read(cls, path: str | Path) -> ExampleFile:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            arrays = load_file(path)
            return cls(arrays["tokens"], arrays["scored"], arrays["starts"])
        except (OSError, KeyError, SafetensorError) as error:
            raise DataError(f"{path}: the prepared examples cannot be read ({error}).") from error

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"tokens": self.tokens, "scored": self.scored, "starts": self.starts}, temporary)
        os.replace(temporary, path)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.starts)

    @property
    def scored_counts(self) -> np.ndarray:
        """Scored tokens of each example (its first is never predicted)."""
        sums = np.concatenate([[0], np.cumsum(self.scored, dtype=np.int64)])
        first = self.scored[self.starts[:-1]].astype(np.int64)
        return sums[self.starts[1:]] - sums[self.starts[:-1]] - first

    @property
    def digest(self) -> str:
        """Changes when anything of the examples does."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.scored, self.starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and marks of one example."""
        place = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.tokens[place], self.scored[place]

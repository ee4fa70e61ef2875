"""One token file as the batch stream sees it: a flat array of tokens and where documents begin."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg.config.errors import DataError
from mtnlg.tokens.index_column import IndexColumn
from mtnlg.tokens.split import Part, split_part
from mtnlg.tokens.token_file import TokenFile

_DIGEST_PIECES = 64
_DIGEST_BYTES = 65_536


class TokenCorpus:
    """A ``.bin``/``.idx`` pair, memory mapped. Each sequence of the file counts as a document.

    Args:
        prefix: path of the pair without its suffixes.
        vocab_size: refuse files that are seen to hold other ids.

    Raises:
        DataError: a file is missing, cut short, damaged, of another vocabulary, or holds no token.
    """

    def __init__(self, prefix: str, vocab_size: int | None = None) -> None:
        file = TokenFile(prefix, vocab_size)
        if file.num_tokens == 0:
            raise DataError(f"{file.token_path} holds no tokens: encode a document that is not empty.")
        self.prefix, self.num_tokens = file.prefix, file.num_tokens
        # A plain view of the map: indexing numpy's memmap class costs several times as much.
        self.tokens = np.asarray(file.tokens)
        self.lengths = IndexColumn(file.lengths)
        self.begins = IndexColumn(file.offsets, file.dtype.itemsize)
        self._hashed = (file.lengths, self.tokens)

    @property
    def name(self) -> str:
        """The last part of the prefix."""
        return Path(self.prefix).name

    @property
    def num_documents(self) -> int:
        """Sequences in the file."""
        return len(self.lengths)

    def part(self, shares: tuple[float, float, float], split: str) -> Part:
        """The documents of one split; see ``mtnlg.tokens.split``."""
        return split_part(self.begins, self.lengths, self.num_tokens, shares, split)

    @cached_property
    def digest(self) -> str:
        """Identifies the content: its sizes and 64 evenly spread pieces of each file.

        Files under 4 MiB are read whole. A change of single tokens inside a larger file can go
        unnoticed; a file that was encoded anew, extended or shuffled does not.
        """
        state = hashlib.blake2b(digest_size=16)
        state.update(f"{self.tokens.dtype.name} {self.num_documents} {self.num_tokens}".encode())
        for array in self._hashed:
            _hash_pieces(state, array)
        return state.hexdigest()


def _hash_pieces(state: Any, array: np.ndarray) -> None:
    piece = _DIGEST_BYTES // array.dtype.itemsize
    if len(array) <= piece * _DIGEST_PIECES:
        state.update(np.ascontiguousarray(array).tobytes())
        return
    for begin in np.linspace(0, len(array) - piece, _DIGEST_PIECES).astype(np.int64):
        state.update(np.ascontiguousarray(array[begin : begin + piece]).tobytes())

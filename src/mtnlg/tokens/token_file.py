"""Reading token files: Megatron's ``.bin``/``.idx``, memory-mapped and checked when opened."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnlg.config.errors import DataError
from mtnlg.tokens.index_format import HEADER, index_size, unpack_header

_BLOCK = 1 << 20  # entries looked at in one go
_SAMPLED_BLOCKS = 64


class TokenFile:
    """Sequences of token ids on disk; ``file[i]`` is sequence ``i``, read when asked for.

    Args:
        prefix: the path without ``.bin``/``.idx`` (given with either ending it works too).
        vocab_size: refuse the file if it holds ids from here up. Files written by mtnlg know their
            largest id; of others 64 blocks are looked at.

    Raises:
        DataError: a file is missing, cut short, of another format, or does not match its partner or
            the vocabulary; the message names the file and what is wrong.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int | None = None) -> None:
        self.prefix = bare_prefix(prefix)
        self.index_path, self.token_path = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (self.index_path, self.token_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist: a token file is a pair PREFIX.bin, PREFIX.idx.")
        self._open_index()
        self._open_tokens()
        if vocab_size is not None:
            self.check_vocabulary(vocab_size)

    def _open_index(self) -> None:
        size = self.index_path.stat().st_size
        with open(self.index_path, "rb") as file:
            header = file.read(HEADER.size)
        self.dtype, sequences, bounds = unpack_header(header, str(self.index_path))
        expected = index_size(sequences, bounds)
        self.has_modes = sequences > 0 and size == expected + sequences
        if size != expected and not self.has_modes:
            raise DataError(
                f"{self.index_path} has {size:,} bytes, but its header speaks of {sequences:,} sequences "
                f"and {bounds:,} document bounds, which take {expected:,}: it is cut short or damaged."
            )
        raw = np.memmap(self.index_path, mode="r", dtype=np.uint8)
        start = HEADER.size
        #: [sequences] tokens of each sequence
        self.lengths: npt.NDArray[np.int32] = raw[start : start + 4 * sequences].view(np.int32)
        start += 4 * sequences
        #: [sequences] where each sequence begins in the ``.bin``, in bytes
        self.offsets: npt.NDArray[np.int64] = raw[start : start + 8 * sequences].view(np.int64)
        start += 8 * sequences
        #: [documents + 1] document ``d`` is the sequences from ``bounds[d]`` up to ``bounds[d + 1]``
        self.document_bounds: npt.NDArray[np.int64] = raw[start : start + 8 * bounds].view(np.int64)
        self.num_tokens = _check_index(self)

    def _open_tokens(self) -> None:
        size, expected = self.token_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if size != expected:
            state = "is cut short" if size < expected else "is longer than its index"
            raise DataError(
                f"{self.token_path} {state}: {size:,} bytes, but the index speaks of {self.num_tokens:,} "
                f"tokens of {self.dtype.itemsize} bytes, {expected:,} in all."
            )
        #: [tokens] all sequences end to end, memory-mapped
        self.tokens: npt.NDArray[Any] = (
            np.memmap(self.token_path, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Sequence ``index``, ``[tokens]``; a view of the file, not a copy."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        start = int(self.offsets[position]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[position])]

    def __reduce__(self) -> tuple[type[TokenFile], tuple[str]]:
        return TokenFile, (self.prefix,)  # another process maps the file anew

    def __repr__(self) -> str:
        return f"TokenFile({self.prefix!r}, {len(self):,} sequences, {self.num_tokens:,} tokens)"

    @property
    def num_documents(self) -> int:
        """Documents in the file, empty ones included."""
        return len(self.document_bounds) - 1

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the writer noted in ``PREFIX.json``; empty where there is none or it belongs elsewhere."""
        try:
            content = json.loads(Path(f"{self.prefix}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = isinstance(content, dict) and content.get("num_tokens") == self.num_tokens
        return content if same and content.get("num_sequences") == len(self) else {}

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """``Tokenizer.fingerprint`` of the tokenizer that made the file, where noted."""
        return self.facts.get("tokenizer_fingerprint")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``DataError`` if the file holds ids of ``vocab_size`` and above, or negative ones."""
        noted = self.facts.get("largest_id")
        largest = noted if isinstance(noted, int) else self.sampled_extremes()[1]
        smallest = 0 if isinstance(noted, int) else self.sampled_extremes()[0]
        if largest >= vocab_size or smallest < 0:
            bad = largest if largest >= vocab_size else smallest
            raise DataError(
                f"{self.token_path} holds token id {bad}, but the vocabulary has only 0 to "
                f"{vocab_size - 1}: it was made with another tokenizer."
            )

    def sampled_extremes(self) -> tuple[int, int]:
        """Smallest and largest id in up to 64 blocks spread over the file."""
        if not self.num_tokens:
            return 0, 0
        starts = {int(s) for s in np.linspace(0, max(self.num_tokens - _BLOCK // 16, 0), _SAMPLED_BLOCKS)}
        blocks = [self.tokens[start : start + _BLOCK // 16] for start in sorted(starts)]
        return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)


def bare_prefix(prefix: str | os.PathLike[str]) -> str:
    """``prefix`` without a ``.bin`` or ``.idx`` ending."""
    text = os.fspath(prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def _check_index(file: TokenFile) -> int:
    """The number of tokens, after lengths, offsets and bounds are seen to belong together."""
    total, itemsize, where = 0, file.dtype.itemsize, file.index_path
    for start in range(0, len(file.lengths), _BLOCK):
        lengths = file.lengths[start : start + _BLOCK].astype(np.int64)
        if lengths.min() < 0:
            bad = start + int(lengths.argmin())
            raise DataError(f"{where}: sequence {bad} has the length {lengths.min()}.")
        ends = np.cumsum(lengths) + total
        wrong = np.flatnonzero(file.offsets[start : start + _BLOCK] != (ends - lengths) * itemsize)
        if len(wrong):
            bad = start + int(wrong[0])
            raise DataError(
                f"{where}: sequence {bad} is said to begin at byte {file.offsets[bad]}, but the sequences "
                f"before it end at byte {(ends - lengths)[wrong[0]] * itemsize}."
            )
        total = int(ends[-1])
    bounds = file.document_bounds
    fits = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(file.lengths)
    if not fits or any(
        np.any(np.diff(bounds[start : start + _BLOCK + 1]) < 0) for start in range(0, len(bounds), _BLOCK)
    ):
        raise DataError(f"{where}: the document bounds do not run from 0 to {len(file.lengths)}.")
    return total

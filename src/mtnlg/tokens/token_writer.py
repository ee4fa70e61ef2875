"""Writing token files: bounded memory, and the two files appear only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens.index_format import CODES, LONGEST_SEQUENCE, pack_header, token_dtype
from mtnlg.tokens.token_file import TokenFile, bare_prefix

_BLOCK = 1 << 20  # entries held in memory while the index is written


class TokenFileWriter:
    """Appends documents to ``PREFIX.bin`` and writes ``PREFIX.idx`` at the end; a context manager.

    Leaving the ``with`` block puts both files in place; leaving it by an error removes what was begun and
    touches nothing else.

    Args:
        prefix: where to write, without ending.
        vocab_size: ids must be below; decides the stored type (uint16 below 65,500, else int32).
        dtype: store another integer type.
        facts: more to note in ``PREFIX.json``, e.g. ``tokenizer_fingerprint``.

    Raises:
        ConfigError: ``dtype`` is none of the format's integer types.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        vocab_size: int,
        dtype: npt.DTypeLike | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.prefix, self.vocab_size = bare_prefix(prefix), vocab_size
        self.dtype = np.dtype(token_dtype(vocab_size) if dtype is None else dtype)
        if self.dtype not in CODES or self.dtype.kind not in "iu":
            raise ConfigError(
                f"token files cannot hold {self.dtype}: use an integer type of up to 64 bits."
            )
        self.facts = dict(facts or {})
        self.num_tokens = self.num_sequences = self.num_documents = self.crc32 = 0
        self.largest_id = -1
        folder = Path(self.prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.open_length = 0  # tokens of the sequence that is being written
        self._sequences_before = 0  # sequences when the open document began
        self._temporary: list[str] = []
        self._tokens = self._temporary_file(folder)
        self._lengths = self._temporary_file(folder)
        self._bounds = self._temporary_file(folder)
        self._bounds.write(np.zeros(1, np.int64).tobytes())

    # -- writing

    def add_document(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one document of one sequence; without ids it is a document without a sequence."""
        self.add_tokens(ids)
        self.end_document()

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Append many documents at once, of one sequence each; the first continues the open one.

        Args:
            ids: [tokens] of all of them, end to end.
            lengths: [documents] how many of ``ids`` each has; they sum to ``len(ids)``.
        """
        if not len(lengths):
            return
        self._write_tokens(ids)
        lengths = lengths.astype(np.int64)
        lengths[0] += self.open_length
        self._require_length(int(lengths.max()))
        self.open_length = 0
        present = lengths[lengths > 0].astype(np.int32)
        self._lengths.write(present.tobytes())
        bounds = self.num_sequences + np.cumsum(lengths > 0, dtype=np.int64)
        self._bounds.write(bounds.tobytes())
        self.num_sequences += len(present)
        self.num_documents += len(lengths)
        self._sequences_before = self.num_sequences

    def add_tokens(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append ids to the sequence that is being written."""
        self.open_length += self._write_tokens(np.asarray(ids))
        if self.open_length > LONGEST_SEQUENCE:
            raise DataError(
                f"{self.prefix}: one sequence is longer than the {LONGEST_SEQUENCE} tokens allowed."
            )

    def end_sequence(self) -> None:
        """Close the sequence that is being written; a document may have several."""
        if self.open_length:
            self._lengths.write(np.asarray([self.open_length], np.int32).tobytes())
            self.num_sequences += 1
            self.open_length = 0

    def end_document(self) -> None:
        """Close the document that is being written."""
        self.end_sequence()
        self._bounds.write(np.asarray([self.num_sequences], np.int64).tobytes())
        self.num_documents += 1
        self._sequences_before = self.num_sequences

    def append_file(self, file: TokenFile) -> None:
        """Append every document of another token file."""
        if self._document_is_open():
            self.end_document()
        for start in range(0, file.num_tokens, _BLOCK):
            self._write_tokens(file.tokens[start : start + _BLOCK])
        for start in range(0, len(file), _BLOCK):
            self._lengths.write(file.lengths[start : start + _BLOCK].tobytes())
        for start in range(1, len(file.document_bounds), _BLOCK):
            bounds = file.document_bounds[start : start + _BLOCK] + self.num_sequences
            self._bounds.write(bounds.tobytes())
        self.num_sequences += len(file)
        self.num_documents += file.num_documents
        self._sequences_before = self.num_sequences

    def _document_is_open(self) -> bool:
        return self.open_length > 0 or self.num_sequences > self._sequences_before

    def _require_length(self, tokens: int) -> None:
        if tokens > LONGEST_SEQUENCE:
            raise DataError(f"{self.prefix}: a sequence is longer than {LONGEST_SEQUENCE} tokens.")

    def _write_tokens(self, ids: npt.NDArray[Any]) -> int:
        if not len(ids):
            return 0
        largest, smallest = int(ids.max()), int(ids.min())
        if largest >= self.vocab_size or smallest < 0:
            bad = largest if largest >= self.vocab_size else smallest
            raise DataError(
                f"{self.prefix}: token id {bad} is outside the vocabulary of {self.vocab_size}."
            )
        raw = np.ascontiguousarray(ids, dtype=self.dtype).data.cast("B")
        self._tokens.write(raw)
        self.crc32 = zlib.crc32(raw, self.crc32)
        self.num_tokens += len(ids)
        self.largest_id = max(self.largest_id, largest)
        return len(ids)

    # -- finishing

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def close(self) -> None:
        """Write the index and put the files in place."""
        try:
            if self._document_is_open():
                self.end_document()
            index = self._temporary_file(Path(self.prefix).parent)
            self._write_index(index)
            sync(self._tokens)
            sync(index)
            facts = self._temporary_file(Path(self.prefix).parent)
            facts.write((json.dumps(self.summary(), indent=1) + "\n").encode())
            sync(facts)
            for file, ending in ((self._tokens, ".bin"), (index, ".idx"), (facts, ".json")):
                os.replace(file.name, self.prefix + ending)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove everything that is not in place yet."""
        for file in (self._tokens, self._lengths, self._bounds):
            file.close()
        for name in self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def summary(self) -> dict[str, Any]:
        """What ``PREFIX.json`` says."""
        return {
            **self.facts,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
            "num_documents": self.num_documents,
            "largest_id": self.largest_id,
            "crc32": f"{self.crc32:08x}",
        }

    def _write_index(self, index: IO[bytes]) -> None:
        index.write(pack_header(self.dtype, self.num_sequences, self.num_documents + 1))
        for block in _blocks(self._lengths, np.int32):
            index.write(block.tobytes())
        total = 0
        for block in _blocks(self._lengths, np.int32):
            ends = total + np.cumsum(block, dtype=np.int64)
            index.write(((ends - block) * self.dtype.itemsize).tobytes())
            total = int(ends[-1])
        for block in _blocks(self._bounds, np.int64):
            index.write(block.tobytes())

    def _temporary_file(self, folder: Path) -> IO[bytes]:
        stem = f".{Path(self.prefix).name}-"
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=stem, suffix=".part")
        os.close(descriptor)
        os.chmod(name, 0o666 & ~_umask())
        self._temporary.append(name)
        return open(name, "w+b", buffering=1 << 18)


def sync(file: IO[bytes]) -> None:
    """Close ``file`` with its bytes on the disk; a full disk shows here and not after the renaming."""
    if not file.closed:
        file.flush()
        os.fsync(file.fileno())
        file.close()


def _blocks(file: IO[bytes], dtype: type[np.generic]) -> Iterable[npt.NDArray[Any]]:
    file.flush()
    file.seek(0)
    while raw := file.read(_BLOCK * np.dtype(dtype).itemsize):
        yield np.frombuffer(raw, dtype)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Opening plain, gzip and Zstandard files as streams of bytes, with errors that name the file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from mtnlg.config.errors import DataError

_COMPRESSED_BLOCK = 1 << 16


class ByteStream:
    """A readable stream that knows how much of the file on disk has been used.

    Args:
        raw: the file on disk.
        stream: what to read from, decompressed.
    """

    def __init__(self, raw: IO[bytes], stream: IO[bytes]) -> None:
        self._raw, self._stream = raw, stream
        self.read, self.readline, self.seek = stream.read, stream.readline, stream.seek

    def disk_position(self) -> int:
        """Bytes of the file on disk that have been read."""
        return self._raw.tell()


@contextmanager
def open_bytes(path: str, compression: str = "") -> Iterator[ByteStream]:
    """Open a file for reading its decompressed bytes.

    Raises:
        DataError: a compressed file is damaged or cut short, or its library is missing.
    """
    with open(path, "rb") as raw:
        try:
            if compression == "gz":
                with gzip.open(raw, "rb") as stream:
                    yield ByteStream(raw, cast("IO[bytes]", stream))
            elif compression == "zst":
                unpacked = io.BufferedReader(_ZstdStream(raw, path), 1 << 18)
                yield ByteStream(raw, cast("IO[bytes]", unpacked))
            else:
                yield ByteStream(raw, raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: the gzip file is damaged or cut short: {error}") from error


class _ZstdStream(io.RawIOBase):
    """Reads all frames of a Zstandard file; unlike the library's reader it notices a missing end."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs a package: pip install 'mtnlg[data]'") from error
        self._library: Any = zstandard
        self._raw, self._path = raw, path
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``; 0 at the end of the last frame."""
        target = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._more():
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _more(self) -> bool:
        packed = self._packed or self._raw.read(_COMPRESSED_BLOCK)
        self._packed = b""
        if not packed:
            if self._frame is not None:
                raise DataError(f"{self._path}: the Zstandard file is cut short.")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._library.ZstdError as error:
            raise DataError(f"{self._path}: the Zstandard file is damaged: {error}") from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True

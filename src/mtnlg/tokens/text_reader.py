"""Plain text files as documents, read in blocks so that a file of any size fits."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from mtnlg.config.errors import DataError
from mtnlg.tokens.compressed import ByteStream, open_bytes
from mtnlg.tokens.documents import Fragment, ReadOptions
from mtnlg.tokens.sources import SourceFile

BLOCK_BYTES = 1 << 20


def read_text(file: SourceFile, options: ReadOptions) -> Iterator[Fragment]:
    """The document of a text file, or its documents where ``options`` name a separator.

    Raises:
        DataError: bytes that are not UTF-8, with line and byte.
    """
    with open_bytes(file.path, file.compression) as stream:
        blocks = _decoded(stream, file.path, options.encoding_errors)
        if options.document_separator is None:
            yield from blocks
            yield Fragment("", True)
        else:
            yield from _separated(blocks, options.document_separator)


def _decoded(stream: ByteStream, path: str, errors: str) -> Iterator[Fragment]:
    rest, base, lines, disk = b"", 0, 1, 0
    while True:
        block = stream.read(BLOCK_BYTES)
        raw = rest + block
        if not base:
            raw = raw.removeprefix(codecs.BOM_UTF8) if block else raw
        try:
            text, used = codecs.utf_8_decode(raw, errors, not block)
        except UnicodeDecodeError as error:
            line = lines + raw.count(b"\n", 0, error.start)
            raise DataError(not_utf8(path, line, base + error.start, raw[error.start :])) from error
        base, rest = base + used, raw[used:]
        lines += text.count("\n")
        now = stream.disk_position()
        yield Fragment(text, False, num_bytes=len(block), disk_bytes=now - disk)
        disk = now
        if not block:
            return


def _separated(blocks: Iterator[Fragment], separator: str) -> Iterator[Fragment]:
    held = ""
    begun = False  # part of the open document has been handed out
    for block in blocks:
        *whole, held = (held + block.text).split(separator)
        for text in whole:
            if begun or text.strip():
                yield Fragment(text, True)
            begun = False
        keep = len(separator) - 1  # the separator may lie across two blocks
        ready, held = (held[:-keep], held[-keep:]) if keep else (held, "")
        begun = begun or bool(ready.strip())
        if not begun:
            ready, held = "", ready + held
        yield Fragment(ready, False, num_bytes=block.num_bytes, disk_bytes=block.disk_bytes)
    if begun or held.strip():
        yield Fragment(held, True)


def not_utf8(path: str, line: int, offset: int, raw: bytes) -> str:
    """The message about bytes that are not UTF-8, with a guess at what they are."""
    advice = "use --encoding-errors replace (or ignore) to go on without them"
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and not offset:
        advice = f"it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8 {path}"
    elif _decodes(raw[:2048], "gb18030"):
        advice = (
            f"if it is Chinese in GB18030, convert it with iconv -f GB18030 -t UTF-8 {path}; or {advice}"
        )
    return f"{path}, line {line}, byte {offset}: not UTF-8 (0x{raw[:1].hex()}); {advice}."


def _decodes(raw: bytes, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        text = decoder.decode(raw)
    except UnicodeDecodeError:
        return False
    return any("一" <= character <= "鿿" for character in text)

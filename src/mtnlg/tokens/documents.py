"""Documents out of text, JSON Lines and Parquet files: streamed, with errors that say where."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtnlg.config.errors import ConfigError
from mtnlg.tokens.sources import SourceFile, find_files

ENCODING_ERRORS = ("strict", "replace", "ignore")


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        text: its whole text.
        id: the ``id`` field where there is one, else the file and the number of the record.
        source: the file it is from.
    """

    text: str
    id: str
    source: str


@dataclass(frozen=True)
class ReadOptions:
    """How documents are taken out of files.

    Args:
        text_key: the field of JSON Lines or Parquet that holds the text.
        encoding_errors: what to do with bytes that are not UTF-8: ``"strict"`` stops with their place,
            ``"replace"`` puts U+FFFD, ``"ignore"`` drops them.
        document_separator: cuts plain text files into documents; ``None`` makes each file one.
    """

    text_key: str = "text"
    encoding_errors: str = "strict"
    document_separator: str | None = None

    def __post_init__(self) -> None:
        if self.encoding_errors not in ENCODING_ERRORS:
            raise ConfigError(
                f"encoding_errors is {self.encoding_errors!r}: choose one of {', '.join(ENCODING_ERRORS)}."
            )
        if self.document_separator == "":
            raise ConfigError("document_separator is empty: give the text that stands between documents.")


@dataclass(frozen=True)
class FileSlice:
    """A part of a file that one worker reads.

    Args:
        file: the file.
        start: where to begin: a byte of JSON Lines (the line it falls into belongs to the slice before,
            unless it begins there), a row group of Parquet.
        end: where to stop (exclusive); ``None`` is the end of the file.
    """

    file: SourceFile
    start: int = 0
    end: int | None = None


@dataclass
class Fragment:
    """A stretch of a document's text, as the readers hand it out.

    Args:
        text: the text; anything up to the whole document.
        last: whether the document ends here.
        id: of the document, on its last fragment; empty where the record has none.
        num_bytes: bytes of the decompressed file that it took.
        disk_bytes: bytes of the file on disk that it took.
    """

    text: str
    last: bool
    id: str = ""
    num_bytes: int = 0
    disk_bytes: int = 0


def read_fragments(part: FileSlice, options: ReadOptions) -> Iterator[Fragment]:
    """The documents of a slice of a file, long plain texts in several fragments.

    Raises:
        DataError: with the file, and the line and byte where there is one.
    """
    kind = part.file.kind
    if kind == "parquet":
        from mtnlg.tokens.parquet_reader import read_parquet

        return read_parquet(part, options)
    if kind == "text":
        from mtnlg.tokens.text_reader import read_text

        return read_text(part.file, options)
    from mtnlg.tokens.json_reader import read_json_lines

    return read_json_lines(part, options)


def read_documents(
    sources: Sequence[str | os.PathLike[str]],
    text_key: str = "text",
    encoding_errors: str = "strict",
    document_separator: str | None = None,
) -> Iterator[Document]:
    """Every document of files, folders and patterns, one after the other.

    Args:
        sources: paths of ``.txt``, ``.jsonl``, ``.json`` (also ``.gz``, ``.zst``) and ``.parquet`` files,
            folders of them, patterns. Other endings are read as plain text.
        text_key: the field that holds the text; a list of texts is joined by line breaks.
        encoding_errors: ``"strict"``, ``"replace"`` or ``"ignore"``.
        document_separator: cuts plain text files into documents.

    Raises:
        ConfigError: an option is wrong.
        DataError: a source is missing or empty, or a record is broken; says where.
    """
    options = ReadOptions(text_key, encoding_errors, document_separator)
    for file in find_files(sources):
        parts: list[str] = []
        number = 0
        for fragment in read_fragments(FileSlice(file), options):
            parts.append(fragment.text)
            if fragment.last:
                number += 1
                text = parts[0] if len(parts) == 1 else "".join(parts)
                yield Document(text, fragment.id or f"{file.path}:{number}", file.path)
                parts = []

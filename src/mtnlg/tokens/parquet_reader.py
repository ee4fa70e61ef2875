"""Parquet files as documents, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mtnlg.config.errors import DataError
from mtnlg.tokens.documents import FileSlice, Fragment, ReadOptions
from mtnlg.tokens.json_reader import text_of_record

_ROWS = 256


def row_group_sizes(path: str) -> list[int]:
    """Compressed bytes of each row group of a Parquet file."""
    metadata = _open(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [
        sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups
    ]


def read_parquet(part: FileSlice, options: ReadOptions) -> Iterator[Fragment]:
    """The documents of some row groups of a Parquet file.

    Raises:
        DataError: the file is damaged or lacks the column; pyarrow is not installed.
    """
    path = part.file.path
    file = _open(path)
    names = file.schema_arrow.names
    if options.text_key not in names:
        raise DataError(
            f"{path}: no column {options.text_key!r}; it has: {', '.join(names)}. "
            "Choose one with --text-key."
        )
    sizes = row_group_sizes(path)
    columns = [options.text_key, *(["id"] if "id" in names and options.text_key != "id" else [])]
    for group in range(part.start, len(sizes) if part.end is None else part.end):
        yield from _rows(file, path, group, columns, sizes[group], options)


def _rows(
    file: Any, path: str, group: int, columns: list[str], size: int, options: ReadOptions
) -> Iterator[Fragment]:
    import pyarrow

    total = max(file.metadata.row_group(group).num_rows, 1)
    number = 0
    try:
        batches = file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)
        for batch in batches:
            for record in batch.to_pylist():
                place = f"{path}, row group {group}, row {number}"
                text, name = text_of_record(record, place, options)
                number += 1
                yield Fragment(text, True, name, len(text.encode("utf-8", "replace")), size // total)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, row group {group}: the Parquet file is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row group {group}: a text is not UTF-8: {error}") from error


def _open(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs a package: pip install 'mtnlg[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: this is no readable Parquet file: {error}") from error

"""Token files read and written by the ``megatron-core`` package itself."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tokens.test_token_file import TOKENS, write_small

from mtnlg.tokens import TokenFile, TokenFileWriter


@pytest.fixture(scope="module")
def indexed():
    """Megatron's module; skips visibly where the package or what it imports is not there."""
    logging.disable(logging.WARNING)
    try:
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="pip install 'mtnlg[bench]'",
            exc_type=ImportError,
        )
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_ours(tmp_path, indexed, mmap: bool) -> None:
    prefix = write_small(tmp_path / "a")
    theirs = indexed.IndexedDataset(str(prefix), mmap=mmap)
    assert [np.asarray(theirs[i]).tolist() for i in range(len(theirs))] == TOKENS
    assert theirs.document_indices.tolist() == [0, 2, 2, 3]
    assert theirs.get(0, offset=1, length=2).tolist() == TOKENS[0][1:3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons_and_write_the_same_bytes(tmp_path, indexed, dtype) -> None:
    documents = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10]]]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        ids = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(ids), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))

    file = TokenFile(tmp_path / "theirs", vocab_size=11)
    assert [row.tolist() for row in file] == [sequence for document in documents for sequence in document]
    assert file.document_bounds.tolist() == [0, 2, 3, 4]

    with TokenFileWriter(tmp_path / "ours", 11, dtype=dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_tokens(sequence)
                writer.end_sequence()
            writer.end_document()
    for ending in (".bin", ".idx"):
        ours, theirs = (Path(tmp_path / f"{name}{ending}").read_bytes() for name in ("ours", "theirs"))
        assert ours == theirs

"""Megatron's .bin/.idx: byte for byte, both ways, and nothing damaged is taken for good."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens import TokenFile, TokenFileWriter
from mtnlg.tokens.index_format import token_dtype

# Three documents: of two sequences, of none, of one.
TOKENS = [[5, 6, 7], [8, 9], [65_000]]
BIN = struct.pack("<6H", 5, 6, 7, 8, 9, 65_000)
IDX = b"".join(
    [
        b"MMIDIDX\x00\x00",
        struct.pack("<Q", 1),  # version
        struct.pack("<B", 8),  # uint16
        struct.pack("<Q", 3),  # sequences
        struct.pack("<Q", 4),  # documents + 1
        struct.pack("<3i", 3, 2, 1),  # lengths in tokens
        struct.pack("<3q", 0, 6, 10),  # where each begins, in bytes
        struct.pack("<4q", 0, 2, 2, 3),  # first sequence of each document, and the end
    ]
)


def write_small(prefix: Path, **options) -> Path:
    with TokenFileWriter(prefix, 65_001, **options) as writer:
        writer.add_tokens([5, 6])
        writer.add_tokens(np.array([7]))
        writer.end_sequence()
        writer.add_tokens([8, 9])
        writer.end_document()
        writer.add_document([])
        writer.add_document(np.array([65_000], np.uint32))
    return prefix


def test_the_writer_follows_the_layout_byte_by_byte(tmp_path) -> None:
    prefix = write_small(tmp_path / "a")
    assert Path(f"{prefix}.bin").read_bytes() == BIN
    assert Path(f"{prefix}.idx").read_bytes() == IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_the_reader_follows_the_layout(tmp_path) -> None:
    (tmp_path / "b.bin").write_bytes(BIN)
    (tmp_path / "b.idx").write_bytes(IDX)
    for name in ("b", "b.bin", "b.idx"):
        file = TokenFile(tmp_path / name)
        assert [file[i].tolist() for i in range(3)] == TOKENS
        assert file[-1].tolist() == TOKENS[-1]
    assert (len(file), file.num_tokens, file.num_documents, file.dtype) == (3, 6, 3, np.uint16)
    assert file.document_bounds.tolist() == [0, 2, 2, 3]
    assert file.facts == {}
    assert file.tokenizer_fingerprint is None
    assert [row.tolist() for row in pickle.loads(pickle.dumps(file))] == TOKENS
    with pytest.raises(IndexError):
        file[3]


def test_many_documents_at_once_and_other_files(tmp_path) -> None:
    with TokenFileWriter(tmp_path / "a", 100, facts={"tokenizer_fingerprint": "abc"}) as writer:
        writer.add_tokens([1])
        writer.add_documents(np.array([2, 3, 4], np.uint32), np.array([1, 0, 2]))
    file = TokenFile(tmp_path / "a", vocab_size=100)
    assert [row.tolist() for row in file] == [[1, 2], [3, 4]]
    assert file.document_bounds.tolist() == [0, 1, 1, 2]
    assert file.tokenizer_fingerprint == "abc"
    with TokenFileWriter(tmp_path / "joined", 100) as writer:
        writer.add_tokens([9])
        writer.append_file(file)
        writer.append_file(file)
        writer.add_document([7])
    joined = TokenFile(tmp_path / "joined")
    assert [row.tolist() for row in joined] == [[9], [1, 2], [3, 4], [1, 2], [3, 4], [7]]
    assert joined.document_bounds.tolist() == [0, 1, 2, 2, 3, 4, 4, 5, 6]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, np.uint16), (65_499, np.uint16), (65_500, np.int32)]
)
def test_the_type_of_tokens(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype


def test_ids_outside_the_vocabulary_are_never_written(tmp_path) -> None:
    for bad in ([300], [-1], [70_000]):
        with (
            pytest.raises(DataError, match="outside the vocabulary"),
            TokenFileWriter(tmp_path / "a", 300) as writer,
        ):
            writer.add_document(bad)
    assert list(tmp_path.iterdir()) == []  # and nothing is left behind
    with pytest.raises(ConfigError, match="float32"):
        TokenFileWriter(tmp_path / "a", 300, dtype="float32")


def test_a_failed_writer_keeps_what_was_there(tmp_path) -> None:
    write_small(tmp_path / "a")
    with pytest.raises(RuntimeError), TokenFileWriter(tmp_path / "a", 300) as writer:
        writer.add_document([1])
        raise RuntimeError("disk full, say")
    assert (tmp_path / "a.bin").read_bytes() == BIN


def test_another_vocabulary_is_refused(tmp_path) -> None:
    prefix = write_small(tmp_path / "a")
    TokenFile(prefix, vocab_size=65_001)
    with pytest.raises(DataError, match="65000"):
        TokenFile(prefix, vocab_size=65_000)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(DataError, match="another tokenizer"):
        TokenFile(prefix, vocab_size=65_000)


def damaged(change) -> bytes:
    raw = bytearray(IDX)
    change(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"", BIN, "cut short"),
        (IDX[:20], BIN, "cut short"),
        (IDX[:-1], BIN, "cut short or damaged"),
        (IDX + b"\0", BIN, "cut short or damaged"),
        (b"PK" + IDX[2:], BIN, "no token index"),
        (damaged(lambda raw: raw.__setitem__(9, 2)), BIN, "version 2"),
        (damaged(lambda raw: raw.__setitem__(17, 9)), BIN, "type code 9"),
        (damaged(lambda raw: raw.__setitem__(17, 7)), BIN, "not token ids"),
        (damaged(lambda raw: raw.__setitem__(18, 255)), BIN, "cut short or damaged"),
        (damaged(lambda raw: raw.__setitem__(25, 255)), BIN, "cut short or damaged"),
        (damaged(lambda raw: raw.__setitem__(37, 255)), BIN, "length"),
        (damaged(lambda raw: raw.__setitem__(34, 4)), BIN, "sequence 1 is said to begin"),
        (damaged(lambda raw: raw.__setitem__(70, 1)), BIN, "document bounds"),
        (damaged(lambda raw: raw.__setitem__(78, 9)), BIN, "document bounds"),
        (IDX, BIN[:-1], r"a\.bin is cut short"),
        (IDX, BIN + b"\0\0", "longer than its index"),
    ],
)
def test_damage_is_named(tmp_path, index: bytes, tokens: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(tokens)
    with pytest.raises(DataError, match=message):
        TokenFile(tmp_path / "a")


def test_a_missing_half_is_named(tmp_path) -> None:
    (tmp_path / "a.idx").write_bytes(IDX)
    with pytest.raises(DataError, match=r"a\.bin does not exist"):
        TokenFile(tmp_path / "a")


def test_an_empty_file_is_whole(tmp_path) -> None:
    with TokenFileWriter(tmp_path / "a", 300):
        pass
    assert len(TokenFile(tmp_path / "a", 300)) == TokenFile(tmp_path / "a").num_tokens == 0


EDITS = st.lists(st.tuples(st.integers(0, len(IDX) - 1), st.integers(0, 255)), max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS, st.integers(0, len(IDX)), st.binary(max_size=20), st.integers(0, len(BIN)))
def test_fuzzed_files_are_read_or_refused(tmp_path, edits, index_end, extra, token_end) -> None:
    raw = bytearray(IDX)
    for place, value in edits:
        raw[place] = value
    (tmp_path / "a.idx").write_bytes(bytes(raw[:index_end]) + extra)
    (tmp_path / "a.bin").write_bytes(BIN[:token_end])
    try:
        file = TokenFile(tmp_path / "a", vocab_size=65_536)
    except DataError:
        return
    assert sum(len(file[i]) for i in range(len(file))) == file.num_tokens


def test_fuzzed_notes_do_no_harm(tmp_path) -> None:
    prefix = write_small(tmp_path / "a")
    for note in ("", "[]", "{", json.dumps({"num_tokens": 99}), "\ud800".encode("utf-8", "surrogatepass")):
        data = note if isinstance(note, bytes) else note.encode()
        (tmp_path / "a.json").write_bytes(data)
        assert TokenFile(prefix, vocab_size=65_001).facts == {}

"""Documents out of every kind of file, and errors that say where."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tokens.texts import ENGLISH, PROSE, VERSE

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens import read_documents
from mtnlg.tokens.documents import FileSlice, ReadOptions, read_fragments
from mtnlg.tokens.sources import find_files


def texts(*sources, **options) -> list[str]:
    return [document.text for document in read_documents([str(source) for source in sources], **options)]


def write_lines(path, records) -> None:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames
        compress = zstandard.ZstdCompressor().compress
        content = compress(content[:half]) + compress(content[half:])
    path.write_bytes(content)


RECORDS = [{"text": VERSE, "id": "verse"}, {"text": PROSE}, {"text": ""}, {"text": ENGLISH, "id": 7}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path, name: str) -> None:
    path = tmp_path / name
    write_lines(path, RECORDS)
    documents = list(read_documents([str(path)]))
    assert [document.text for document in documents] == [VERSE, PROSE, "", ENGLISH]
    assert [document.id for document in documents] == ["verse", f"{path}:2", f"{path}:3", "7"]
    assert {document.source for document in documents} == {str(path)}


def test_parquet(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {"text": [VERSE, PROSE, ENGLISH], "lines": [["a", "b"], [], ["c"]], "id": [1, 2, 3]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == [VERSE, PROSE, ENGLISH]
    assert texts(tmp_path, text_key="lines") == ["a\nb", "", "c"]
    with pytest.raises(DataError, match="it has: text, lines, id"):
        texts(tmp_path, text_key="body")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="no readable Parquet"):
        texts(tmp_path)


def test_a_text_file_is_one_document_unless_a_separator_is_given(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (VERSE + "\n\n" + PROSE).encode())
    assert texts(path) == [VERSE + "\n\n" + PROSE]
    assert texts(path, document_separator="\n\n\n") == [VERSE[:-1], PROSE]
    (tmp_path / "a.py").write_text(ENGLISH)
    assert texts(tmp_path / "*.py") == [ENGLISH]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["秋", "ab", "|", "||", "\n", "é"])).map("".join), st.integers(1, 7))
def test_blocks_of_any_size_give_the_same_text(
    tmp_path, monkeypatch_block, content: str, size: int
) -> None:
    monkeypatch_block(size)
    (tmp_path / "a.txt").write_bytes(content.encode() + b".")
    assert texts(tmp_path / "a.txt") == [content + "."]
    expected = [part for part in (content + ".").split("||") if part.strip()]
    assert texts(tmp_path / "a.txt", document_separator="||") == expected


@pytest.fixture
def monkeypatch_block(monkeypatch):
    from mtnlg.tokens import text_reader

    return lambda size: monkeypatch.setattr(text_reader, "BLOCK_BYTES", size)


def test_lists_of_texts_are_joined_and_arrays_are_read(tmp_path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"paragraphs": ["一", "二"]}])
    assert texts(tmp_path / "a.jsonl", text_key="paragraphs") == ["一\n二"]
    (tmp_path / "b.json").write_text(json.dumps(RECORDS, indent=1))
    assert texts(tmp_path / "b.json") == [VERSE, PROSE, "", ENGLISH]


def test_folders_and_patterns_are_read_in_order_and_once(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    for name, content in (
        ("b.txt", "2"),
        ("deep/a.txt", "3"),
        ("a.txt", "1"),
        (".hidden.txt", "x"),
        ("c.bin", "x"),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").write_text("")
    assert texts(tmp_path) == ["1", "2", "3"]
    assert texts(tmp_path / "a.txt", tmp_path) == ["1", "2", "3"]
    assert texts(tmp_path / "**" / "a.txt") == ["1", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2, byte 24: broken JSON"),
        (b'{"text": "a"}\n\n{"body": 1}\n', r"line 3: no field 'text'; it has: body"),
        (b'{"text": 5}\n', r"line 1: the field 'text' is a number"),
        (b'{"text": null}\n', "is null"),
        (b'{"text": ["a", 1]}\n', "a list"),
        (b'["a"]\n', "not an object"),
        (
            b'{"text": "a"}\n{"text": "\xff"}\n',
            r"line 2, byte 24: not UTF-8 \(0xff\); use --encoding-errors",
        ),
        (b'{"text": "a\\ud800"}\n', "line 1, byte 0: .*half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_lines_are_named(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)a\.jsonl.*{message}"):
        texts(tmp_path / "a.jsonl")


def test_wrong_encodings_are_named_and_can_be_passed_over(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\xfe three\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2, byte 8: not UTF-8 \(0xff\)"):
        texts(path)
    assert texts(path, encoding_errors="replace") == ["one\ntwo �� three\n"]
    assert texts(path, encoding_errors="ignore") == ["one\ntwo  three\n"]
    path.write_bytes(PROSE.encode("gb18030"))
    with pytest.raises(DataError, match="iconv -f GB18030"):
        texts(path)
    path.write_bytes(PROSE.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        texts(path)
    path.write_bytes(PROSE.encode()[:-2])  # cut inside a character
    texts(path, encoding_errors="replace")
    with pytest.raises(ConfigError, match="choose one of strict"):
        texts(path, encoding_errors="hope")
    with pytest.raises(ConfigError, match="empty"):
        texts(path, document_separator="")
    write_lines(tmp_path / "b.jsonl", [])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\xff\\ud83dz"}')
    assert texts(tmp_path / "b.jsonl", encoding_errors="replace") == ["a��z"]
    assert texts(tmp_path / "b.jsonl", encoding_errors="ignore") == ["az"]


def test_missing_and_empty_sources_are_named(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for source, message in (
        (tmp_path / "nothing.txt", "does not exist"),
        (tmp_path / "*.jsonl", "matches no file"),
        (tmp_path / "folder", "holds no"),
        (tmp_path / "empty.txt", "is empty"),
        (tmp_path / "*.txt", "are empty"),
    ):
        with pytest.raises(DataError, match=message):
            texts(source)
    with pytest.raises(DataError, match="no source"):
        texts()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_packed_files_that_are_damaged_or_cut_short(tmp_path, name: str) -> None:
    write_lines(tmp_path / name, RECORDS * 50)
    whole = (tmp_path / name).read_bytes()
    for content in (whole[:-20], b"nonsense" + whole):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl.*(damaged|cut short)"):
            texts(tmp_path / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([VERSE, "", ENGLISH, "é\n"]), min_size=1, max_size=8), st.integers(1, 400))
def test_slices_of_a_file_hold_each_line_once(tmp_path, contents: list[str], size: int) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in contents])
    [file] = find_files([str(tmp_path / "a.jsonl")])
    edges = [*range(0, file.size, size), file.size]
    parts = [FileSlice(file, a, b) for a, b in pairwise(edges)]
    found = [list(read_fragments(part, ReadOptions())) for part in parts]
    assert [fragment.text for part in found for fragment in part] == contents
    assert sum(fragment.disk_bytes for part in found for fragment in part) == file.size


def test_a_slice_counts_lines_from_the_start_of_the_file(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\nnonsense\n')
    [file] = find_files([str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match="line 3, byte 28"):
        list(read_fragments(FileSlice(file, 20, file.size), ReadOptions()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1), st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"]))
def test_fuzzed_files_are_read_or_refused(tmp_path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    for errors in ("strict", "replace"):
        try:
            for document in read_documents([str(tmp_path / name)], encoding_errors=errors):
                document.text.encode("utf-8")
        except DataError as error:
            assert name in str(error)

import json

import pytest

from mtnlg.config import DataError
from mtnlg.corpus import demo_sources
from mtnlg.corpus.demo_sources import CHINESE_FOLDER, gather_demo_sources, titled_pieces


def documents(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_three_corpora_of_whole_documents(tmp_path):
    sources = gather_demo_sources(tmp_path)
    english, code, chinese = map(documents, (sources.english, sources.code, sources.chinese))
    assert len(english) > 100
    assert any("def " in document["text"] for document in code)
    assert sum(len(document["text"].encode()) for document in code) <= demo_sources.CODE_BYTES
    assert all(document["text"].strip() for document in english + code + chinese)
    ids = [document["id"] for document in english + code + chinese]
    assert len(set(ids)) == len(ids)


def test_what_is_there_stays_as_it_is(tmp_path):
    first = gather_demo_sources(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert gather_demo_sources(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_without_the_chinese_texts_the_others_remain(tmp_path):
    sources = gather_demo_sources(tmp_path / "out", chinese_folder=tmp_path / "none")
    assert sources.chinese is None
    assert sources.code.exists()


def test_pieces_begin_at_title_lines(tmp_path):
    (tmp_path / "a.txt").write_text("# 一\n第一行\n有 # 号的行\n\n# 二\n第二篇\n", encoding="utf-8")
    pieces = list(titled_pieces(tmp_path))
    assert pieces == [("a/一", "一\n第一行\n有 # 号的行\n"), ("a/二", "二\n第二篇\n")]


def test_a_long_topic_is_cut_between_paragraphs_and_loses_nothing():
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 60 for number in range(20))
    parts = list(demo_sources._sections(text))
    assert len(parts) > 2
    assert "\n".join(parts) == text + "\n"


def test_nothing_to_write_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no such text"):
        demo_sources._write_documents(tmp_path / "x.jsonl", [])
    assert list(tmp_path.iterdir()) == []


def test_the_poems_have_the_form_they_claim():
    """Five- and seven-character verse: every verse of a piece has the same length."""
    for name, length in (("01-wuyan", 5), ("02-qiyan", 7)):
        pieces = [text for title, text in titled_pieces(CHINESE_FOLDER) if title.startswith(name)]
        assert len(pieces) > 40
        for text in pieces:
            title, *lines = text.splitlines()
            verses = "".join(lines).replace("。", "，").split("，")
            assert {len(verse) for verse in verses if verse} == {length}, title

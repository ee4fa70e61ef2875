"""Chat data of all forms, and what is said about data that cannot be learnt from."""

import gzip
import json
from pathlib import Path

import pytest
from tests.tuning.helpers import write_lines

from mtnlg.config import DataError
from mtnlg.tuning import read_conversations

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "zh"
QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SAME = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "instruction": {"instruction": "q", "input": "", "output": "a"},
    "completion": {"prompt": "q", "completion": "a"},
    "kdconv": {"messages": [{"message": "q"}, {"message": "a", "attrs": []}, {"message": "bye"}]},
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_says_the_same(tmp_path, form):
    path = write_lines(tmp_path / "chats.jsonl", [SAME[form]])
    for asked in (form, "auto"):
        (found,) = read_conversations([str(path)], asked)
        assert found.messages == [QUESTION, ANSWER]
        assert found.is_plain == (form == "completion")
        assert found.where == f"{path}, line 1"


def test_parts_of_a_record_are_kept(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl",
        [
            {"instruction": "Sort", "input": "b a", "output": "a b", "system": "S"},
            {"system": "T", **SAME["sharegpt"]},
            {"messages": [{"role": "developer", "content": "U"}, QUESTION, ANSWER]},
            SAME["messages"],
            SAME["completion"],
        ],
    )
    found = read_conversations([str(path)], system="default")
    assert [c.messages[0]["content"] for c in found] == ["S", "T", "U", "default", "q"]
    assert found[0].messages[1]["content"] == "Sort\n\nb a"


def test_arrays_and_compressed_files_have_lines_too(tmp_path):
    array = tmp_path / "chats.json"
    array.write_text(json.dumps([SAME["kdconv"], SAME["messages"]], indent=1))
    found = read_conversations([str(array)])
    lines = array.read_text().splitlines()
    second = int(found[1].where.rsplit(" ", 1)[1])
    assert found[0].where.endswith("line 2")
    assert lines[second - 1].strip() == "{" and '"role"' in "".join(lines[second : second + 4])
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(SAME["messages"]).encode()))
    assert len(read_conversations([str(packed)])) == 1


def test_long_dialogues_become_parts_that_end_with_an_answer(tmp_path):
    turns = [{"message": str(number)} for number in range(11)]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}])
    parts = read_conversations([str(path)], max_turns=4)
    assert [[m["content"] for m in part.messages] for part in parts] == [
        ["0", "1", "2", "3"],
        ["4", "5", "6", "7"],
        ["8", "9"],
    ]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, "messages[1] is an empty answer"),
        ({"messages": [QUESTION, {"role": "robot", "content": "a"}]}, "messages[1].role is 'robot'"),
        ({"messages": [QUESTION]}, "the last message is not the assistant's"),
        ({"messages": [ANSWER]}, "messages[0] answers nothing"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "messages[1] is the user's, like the one before it"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "conversations[0].from is 'alien'"),
        ({"instruction": "q", "output": ""}, "output is empty"),
        ({"prompt": "q"}, "completion is missing"),
        ({"prompt": 3, "completion": "a"}, "prompt is 3"),
        ({"text": "q"}, "its fields (text) are of no known form"),
        ([1], "the record is a list"),
    ],
)
def test_each_wrong_record_is_named_with_its_line(tmp_path, record, problem):
    path = write_lines(tmp_path / "chats.jsonl", [SAME["messages"], record])
    with pytest.raises(DataError) as caught:
        read_conversations([str(path)])
    assert f"{path}, line 2: {problem}" in str(caught.value)


def test_all_problems_are_counted_and_the_first_ones_shown(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": [QUESTION]}] * 30)
    with pytest.raises(DataError) as caught:
        read_conversations([str(path)])
    assert "30 records" in str(caught.value) and "line 10:" in str(caught.value)
    assert "line 11:" not in str(caught.value) and "20 more" in str(caught.value)


def test_broken_files_are_named(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(SAME["messages"]) + "\n{oops\n")
    with pytest.raises(DataError, match="line 2: broken JSON"):
        read_conversations([str(broken)])
    broken.write_bytes(b'{"messages": 1}\n"\xff"\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_conversations([str(broken)])
    array = tmp_path / "cut.json"
    array.write_text("[\n" + json.dumps(SAME["messages"]) + ",\n")
    with pytest.raises(DataError, match="line 3: broken JSON"):
        read_conversations([str(array)])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real dialogues are not beside the repository")
def test_real_dialogues_are_read():
    found = read_conversations([str(REAL / "kdconv_film_dev.json")])
    assert len(found) == 150
    assert all(len(c.messages) % 2 == 0 and c.messages[-1]["role"] == "assistant" for c in found)

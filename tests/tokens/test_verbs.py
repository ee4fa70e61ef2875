"""The verbs `tokenizer` and `encode`, as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.tokens.texts import CODE, ENGLISH, PROSE, TEXTS, VERSE

from mtnlg.cli.main import main
from mtnlg.config.errors import ConfigError
from mtnlg.tokens import TokenFile, Tokenizer
from mtnlg.tokens.training import HELD_OUT_EVERY, train_on_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    records = [{"text": text, "id": str(number)} for number, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "texts" / "a.jsonl").write_text(lines)
    return tmp_path


def test_from_text_to_tokens(corpus, capsys) -> None:
    assert main(["tokenizer", "texts", "--vocab-size", "400", "--out", "tok"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tok: 400 tokens", said)
    assert re.search(r"\d\.\d{3} characters \(\d\.\d\d bytes\) a token on the training text", said)
    tokenizer = Tokenizer.from_pretrained("tok")

    assert main(["encode", "texts", "--tokenizer", "tok", "--out", "data/a", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    file = TokenFile("data/a", tokenizer.vocab_size)
    assert [tokenizer.decode(row) for row in file] == TEXTS
    assert f"{len(TEXTS)} documents, {file.num_tokens:,} tokens" in said
    assert "MB/s" in said or "kB/s" in said

    assert main(["encode", "texts", "--tokenizer", "tok", "--out", "data/a"]) == 0
    assert "finished already" in capsys.readouterr().err
    assert main(["encode", "texts", "--tokenizer", "tok", "--out", "data/a", "--no-end-of-text"]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["tokenizer", "texts", "--vocab-size", "400", "--out", "tok"]) == 2
    assert "a tokenizer already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenizer", "nowhere", "--vocab-size", "400", "--out", "x"], "nowhere does not exist"),
        (["tokenizer", "texts", "--vocab-size", "100", "--out", "x"], "at least 262"),
        (
            ["tokenizer", "texts", "--vocab-size", "400", "--out", "x", "--text-key", "body"],
            "it has: text, id",
        ),
        (["encode", "texts", "--tokenizer", "nowhere", "--out", "x"], "nowhere is not a tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(corpus, capsys, words: list[str], message: str) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_a_separator_is_typed_with_a_backslash(corpus) -> None:
    Tokenizer.train(TEXTS, 300).save_pretrained("tok")
    Path("a.txt").write_text(f"{PROSE}\n\n{VERSE}\n\n{ENGLISH}")
    words = ["encode", "a.txt", "--tokenizer", "tok", "--out", "b", "--document-separator", r"\n\n\n"]
    assert main(words) == 0
    assert TokenFile("b").num_documents == 3


def test_training_keeps_some_text_out_and_samples_evenly(tmp_path) -> None:
    lines = [json.dumps({"text": f"{text}{n}"}) for n in range(HELD_OUT_EVERY) for text in (PROSE, CODE)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    whole = sum(len(json.loads(line)["text"]) for line in lines)
    tokenizer, report = train_on_files([tmp_path / "a.jsonl"], 400)
    assert report.held_out
    assert 0.9 * whole < report.num_characters < whole
    assert report.characters_per_token == pytest.approx(
        tokenizer.characters_per_token([CODE + "24"]), rel=0.5
    )
    size = (tmp_path / "a.jsonl").stat().st_size
    _, half = train_on_files([tmp_path / "a.jsonl"], 400, sample_bytes=size // 2)
    assert 0.4 * whole < half.num_characters < 0.6 * whole
    with pytest.raises(ConfigError, match="sample_bytes"):
        train_on_files([tmp_path / "a.jsonl"], 400, sample_bytes=0)


@pytest.mark.parametrize("page", ["tokenizer", "encode", "formats"])
def test_the_python_of_the_pages_runs(page: str, corpus) -> None:
    Tokenizer.train(TEXTS, 400).save_pretrained("tokenizer")
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples, f"{page}.md shows no Python"
    for code in examples:
        exec(compile(code, page, "exec"), {})  # an example that is wrong raises

"""Encoding files: the right ids, the same result however it is done, nothing lost when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tokens.test_encoders import MIXED
from tests.tokens.texts import CODE, ENGLISH, PROSE, VERSE, small_tokenizer

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens import TokenFile, encode_files, encode_plan, encode_pool, encode_task, text_reader
from mtnlg.tokens import encode as encode_module
from mtnlg.tokens.documents import ReadOptions
from mtnlg.tokens.encode_task import EncodeSettings

END = 0


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def expected(texts: list[str]) -> list[list[int]]:
    return [[*small_tokenizer().encode(text), END] for text in texts if text]


def rows(prefix) -> list[list[int]]:
    return [row.tolist() for row in TokenFile(prefix, small_tokenizer().vocab_size)]


def outputs(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(MIXED | st.sampled_from([PROSE * 9, ENGLISH * 9]), min_size=1, max_size=12), st.integers(1, 60)
)
def test_every_document_has_its_ids_and_its_end(
    tmp_path, small_batches, texts: list[str], size: int
) -> None:
    small_batches(size)
    source = write_lines(tmp_path / "a.jsonl", [*texts, "x"])
    encode_files([source], small_tokenizer(), tmp_path / "out", overwrite=True)
    assert rows(tmp_path / "out") == expected([*texts, "x"])
    file = TokenFile(tmp_path / "out")
    assert file.num_documents == len(texts) + 1
    assert np.diff(file.document_bounds).tolist() == [int(bool(text)) for text in (*texts, "x")]


@pytest.fixture
def small_batches(monkeypatch):
    """Batches, blocks and tasks of a few characters, so that little text crosses every border."""

    def apply(size: int) -> None:
        monkeypatch.setattr(encode_task, "BATCH_CHARACTERS", size)
        monkeypatch.setattr(text_reader, "BLOCK_BYTES", size)
        monkeypatch.setattr(encode_plan, "_SMALLEST_TASK", size * 5)

    return apply


@pytest.mark.parametrize("size", [1, 7, 50, 1000])
def test_a_text_file_in_blocks_is_one_document(tmp_path, small_batches, size: int) -> None:
    text = (VERSE + PROSE + CODE + ENGLISH) * 3
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("啊" * 100)  # nowhere to cut
    small_batches(size)
    report = encode_files([tmp_path], small_tokenizer(), tmp_path / "out")
    assert rows(tmp_path / "out") == expected([text, "啊" * 100])
    assert report.num_characters == len(text) + 100
    assert report.num_bytes == len((text + "啊" * 100).encode())
    encode_files(
        [tmp_path / "a.txt"],
        small_tokenizer(),
        tmp_path / "parts",
        document_separator="\n\n\n\t",
        overwrite=True,
    )
    assert rows(tmp_path / "parts") == expected(text.split("\n\n\n\t"))


def test_without_end_of_text(tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [VERSE, "", ENGLISH])
    encode_files([source], small_tokenizer(), tmp_path / "out", append_end_of_text=False)
    assert rows(tmp_path / "out") == [small_tokenizer().encode(VERSE), small_tokenizer().encode(ENGLISH)]


def test_workers_and_engines_do_not_change_the_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode_plan, "_SMALLEST_TASK", 4000)
    source = write_lines(tmp_path / "a.jsonl", [VERSE * 3, ENGLISH, "", PROSE * 2, CODE] * 40)
    told: list[tuple[str, float, float | None, str]] = []
    here = encode_files([source], small_tokenizer(), tmp_path / "here", engine="tokenizers")
    monkeypatch.setattr(encode_pool, "_INLINE_BYTES", 0)
    there = encode_files(
        [source],
        small_tokenizer(),
        tmp_path / "there",
        workers=2,
        progress=lambda *told_now: told.append(told_now),
    )
    assert outputs(tmp_path / "here") == outputs(tmp_path / "there")
    assert here.num_tasks == there.num_tasks > 4
    assert here.num_tokens == there.num_tokens == len(np.fromfile(tmp_path / "here.bin", np.uint16))
    encoding = [entry for entry in told if entry[0] == "encoding"]
    assert encoding[-1] == ("encoding", source.stat().st_size, source.stat().st_size, "bytes")
    assert not (tmp_path / "there.parts").exists()
    facts = TokenFile(tmp_path / "there").facts
    assert facts["tokenizer_fingerprint"] == small_tokenizer().fingerprint


def test_a_finished_job_is_not_done_again_and_others_are_kept(tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [VERSE])
    first = encode_files([source], small_tokenizer(), tmp_path / "out")
    again = encode_files([source], small_tokenizer(), tmp_path / "out")
    assert (first.num_resumed, again.num_resumed) == (0, 1)
    assert again.num_tokens == first.num_tokens
    write_lines(source, [PROSE])
    with pytest.raises(DataError, match=r"out\.bin exists already"):
        encode_files([source], small_tokenizer(), tmp_path / "out")
    assert rows(tmp_path / "out") == expected([VERSE])
    encode_files([source], small_tokenizer(), tmp_path / "out", overwrite=True)
    assert rows(tmp_path / "out") == expected([PROSE])


def test_a_broken_source_keeps_the_finished_parts_and_the_old_output(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode_plan, "_SMALLEST_TASK", 300)
    source = write_lines(tmp_path / "a.jsonl", [VERSE] * 20)
    encode_files([source], small_tokenizer(), tmp_path / "out")
    before = outputs(tmp_path / "out")
    with source.open("a") as file:
        file.write("{broken\n")
    for inline in (1 << 20, 0):  # in this process, and in workers
        monkeypatch.setattr(encode_pool, "_INLINE_BYTES", inline)
        with pytest.raises(DataError, match=r"a\.jsonl, line 21, byte .*: broken JSON"):
            encode_files([source], small_tokenizer(), tmp_path / "out", overwrite=True, workers=1)
        assert outputs(tmp_path / "out") == before
    assert len(list((tmp_path / "out.parts").glob("*.idx"))) > 3


def test_an_interrupted_job_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode_plan, "_SMALLEST_TASK", 300)
    source = write_lines(tmp_path / "a.jsonl", [VERSE, ENGLISH] * 20)
    run = encode_task.Encoding.run
    calls = []

    def stop_at_the_fourth(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(encode_task.Encoding, "run", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        encode_files([source], small_tokenizer(), tmp_path / "out")
    # A part that was damaged meanwhile is made again.
    (tmp_path / "out.parts" / "000001.bin").write_bytes(b"")
    report = encode_files([source], small_tokenizer(), tmp_path / "out")
    assert report.num_resumed == 2
    assert len(calls) == 4 + report.num_tasks - 2
    assert rows(tmp_path / "out") == expected([VERSE, ENGLISH] * 20)


def test_killed_while_encoding(tmp_path) -> None:
    """SIGKILL of the whole tool: no worker stays behind, the next run goes on and the result is whole."""
    source = write_lines(tmp_path / "a.jsonl", [PROSE * 30, CODE * 30] * 400)
    small_tokenizer().save_pretrained(tmp_path / "tok")
    command = [sys.executable, "-m", "mtnlg", "encode", str(source), "--tokenizer", str(tmp_path / "tok")]
    command += ["--out", str(tmp_path / "out"), "--workers", "1", "--engine", "tokenizers"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        not list(tmp_path.glob("out.parts/0*.json"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.bin").exists()
    report = encode_files([source], small_tokenizer(), tmp_path / "out", workers=1)
    assert 0 < report.num_resumed < report.num_tasks
    assert TokenFile(tmp_path / "out", small_tokenizer().vocab_size).num_documents == 800
    assert rows(tmp_path / "out")[:2] == expected([PROSE * 30, CODE * 30])


def test_a_killed_worker_is_reported(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(encode_pool, "_INLINE_BYTES", 0)
    source = write_lines(tmp_path / "a.jsonl", [VERSE])
    start = encode_pool._start

    def start_and_kill():
        process = start()
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(encode_pool, "_start", start_and_kill)
    with pytest.raises(DataError, match="ended with code -9"):
        encode_files([source], small_tokenizer(), tmp_path / "out", workers=1)


def test_two_jobs_cannot_write_the_same_output(tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [VERSE])
    plan = encode_plan.make_plan([], "", EncodeSettings())
    taken = encode_module._parts_folder(str(tmp_path / "out"), plan, small_tokenizer())
    with taken, pytest.raises(DataError, match="another job"):
        encode_files([source], small_tokenizer(), tmp_path / "out")


def test_settings_that_change_the_ids_change_the_job(tmp_path) -> None:
    from mtnlg.tokens.sources import find_files

    files = find_files([write_lines(tmp_path / "a.jsonl", [VERSE])])
    plain = EncodeSettings()
    others = [EncodeSettings(append_end_of_text=False), EncodeSettings(ReadOptions("body"))]
    keys = {encode_plan.make_plan(files, name, each).key for name in "ab" for each in (plain, *others)}
    assert len(keys) == 6
    fast = EncodeSettings(engine="splintr")
    assert encode_plan.make_plan(files, "a", fast).key == encode_plan.make_plan(files, "a", plain).key


def test_nothing_to_encode_is_an_error(tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match="no text in the 2 documents"):
        encode_files([source], small_tokenizer(), tmp_path / "out")
    with pytest.raises(ConfigError, match="workers is 0"):
        encode_files([source], small_tokenizer(), tmp_path / "out", workers=0)
    assert not (tmp_path / "out.bin").exists()


def test_parquet_row_groups_are_shared_out(tmp_path, monkeypatch) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    texts = [f"{VERSE}{number}" for number in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    monkeypatch.setattr(encode_plan, "_SMALLEST_TASK", 100)
    report = encode_files([tmp_path / "a.parquet"], small_tokenizer(), tmp_path / "out")
    assert report.num_tasks > 1
    assert rows(tmp_path / "out") == expected(texts)

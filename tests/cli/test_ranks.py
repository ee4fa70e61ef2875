"""Models over ranks on the real command line: the same text, and an end that is told when a rank dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.load import NAME, server_process, write_model

from mtnlg import MegatronLmModel
from mtnlg.cli.main import main
from mtnlg.config.adapter import AdapterConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PATIENCE_SECONDS = 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    adapted = MegatronLmModel.from_pretrained(folder)
    adapted.add_adapter(AdapterConfig(method="prompt", num_virtual_tokens=4))
    adapted.save_adapter(folder / "soft")
    return folder


def generate(folder: Path, *options: str) -> list[str]:
    settings = ["--max-new-tokens", "12", "--temperature", "0.9", "--seed", "3"]
    return ["generate", str(folder), "the cat sat on", *settings, *options]


def children(process_id: int) -> list[int]:
    tasks = Path(f"/proc/{process_id}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def eventually(check: Callable[[], Any]) -> Any:
    ends = time.monotonic() + PATIENCE_SECONDS
    while not (found := check()):
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.02)
    return found


def test_ranks_write_what_one_process_writes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = {}
    for adapter in (None, "soft"):
        words = [] if adapter is None else ["--adapter", str(folder / adapter)]
        assert main(generate(folder, *words)) == 0
        expected[adapter] = capfd.readouterr().out
    assert expected["soft"] != expected[None]
    words = ["--adapter", str(folder / "soft"), "--tensor-parallel-size", "2"]
    command = [sys.executable, "-m", "mtnlg", *generate(folder, *words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stdout) == (0, expected["soft"]), done.stderr


def test_layout_that_does_not_fit_is_refused_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(generate(folder, "--tensor-parallel-size", "3")) == 2
    said = capsys.readouterr().err
    assert "tensor_parallel_size is 3: it must divide model.num_attention_heads (2)" in said
    assert main(generate(folder, "--pipeline-parallel-size", "5")) == 2
    assert "pipeline_parallel_size is 5" in capsys.readouterr().err


def test_rank_that_dies_ends_the_server_with_a_message(folder: Path) -> None:
    said = {NAME: MegatronLmModel.from_pretrained(folder), "soft": MegatronLmModel.from_pretrained(folder)}
    said["soft"].add_adapter(folder / "soft")
    options = ("--pipeline-parallel-size", "2", "--adapter", f"soft={folder / 'soft'}")
    with server_process(folder, *options) as (process, url):
        for name, model in said.items():
            body = {"model": name, "prompt": "the dog", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
            text = model.generate("the dog", max_new_tokens=8, temperature=0.0)
            assert f"the dog{answer['choices'][0]['text']}".startswith(text), answer
        (other,) = children(process.pid)
        os.kill(other, signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) == 1
    said = (folder / "server.log").read_text(encoding="utf-8")
    assert "rank 1 died of SIGKILL" in said


def test_other_ranks_end_with_the_first_one(folder: Path) -> None:
    with server_process(folder, "--tensor-parallel-size", "2") as (process, _url):
        (other,) = children(process.pid)
        process.kill()
        process.wait()
        eventually(lambda: not is_running(other))
        assert not is_running(other)


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_server_over_ranks_drains_and_ends_in_order(folder: Path) -> None:
    with server_process(folder, "--tensor-parallel-size", "2") as (process, _url):
        (other,) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert not Path(f"/proc/{other}").exists()
    assert "Traceback" not in (folder / "server.log").read_text(encoding="utf-8")

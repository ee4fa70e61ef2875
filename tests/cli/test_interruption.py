"""Ctrl-C and SIGTERM as a user or a cluster sends them to ``mtnlg train``."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtnlg.cli.main import main

TEXTS = Path(__file__).resolve().parents[2] / "data" / "zh"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("interruption")
    path = place / "recipe.yaml"
    path.write_text(
        "model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}\n"
        "tokenizer: {vocab_size: 400}\n"
        f"data: {{sequence_length: 32, split: '80,10,10', sources: [{TEXTS}/0*.txt]}}\n"
        "batch: {micro_batch_size: 2, global_batch_size: 2}\n"
        "stop: {steps: 1000000}\n"
        "evaluation: {interval_steps: 0, num_batches: 1}\n"
    )
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(recipe, capsys, number, code):
    run = recipe.parent / f"run{code}"
    words = ["train", str(recipe), f"--run_dir={run}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "mtnlg", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in child.stderr:
        if "loss" in line:
            break
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    assert f"go on with:  mtnlg train {run}/config.yaml" in out
    assert "Traceback" not in err
    assert list((run / "checkpoints").glob("step-*/manifest.json"))

    steps = int(next((run / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert main([*words, f"--stop.steps={steps + 1}"]) == 0
    assert f"going on from step {steps}" in capsys.readouterr().err

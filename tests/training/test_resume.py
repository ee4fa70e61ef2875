"""A run that was killed, interrupted or stopped goes on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.training.helpers import Recorder, metrics_lines, small_config, train_here

from mtnlg.config import (
    CheckpointConfig,
    CheckpointError,
    DataError,
    LayoutConfig,
    OptimizerConfig,
    PrecisionConfig,
    StopConfig,
)
from mtnlg.training import StepMetrics, TrainingCallback

ROOT = Path(__file__).resolve().parents[2]


class Signaller(TrainingCallback):
    """Sends this process a signal at a step; with two, the second comes right after."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def train_in_child(config, *callbacks: TrainingCallback) -> subprocess.CompletedProcess:
    code = (
        "import pickle, sys; config, callbacks = pickle.load(sys.stdin.buffer);"
        "from tests.training.helpers import train_here;"
        "sys.exit(train_here(config, *callbacks).exit_code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((config, callbacks)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=120,
    )


def tensors(config, step: int) -> dict:
    folder = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    return {
        (path.parent.name, name): tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)


def elsewhere(config, folder: Path):
    """The same run in another folder."""
    folder.mkdir()
    return replace(config, run_dir=str(folder))


@pytest.mark.parametrize(("precision", "optimizer"), [("float32", "adamw"), ("fp16", "muon")])
def test_killed_run_resumes_bit_identically(tmp_path, precision, optimizer):
    """Killed by SIGKILL in step 5, after the checkpoint of step 4; dropout is on."""
    config = small_config(
        tmp_path,
        precision=PrecisionConfig(precision, loss_scale_window=2),
        optimizer=OptimizerConfig(optimizer, learning_rate=3e-3),
        checkpoint=CheckpointConfig(2, keep_last=100, asynchronous=False),  # complete when it is killed
    )
    undisturbed = elsewhere(config, tmp_path / "undisturbed")
    train_here(undisturbed)
    killed = train_in_child(config, Signaller(5, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics_lines(config)] == [1, 2, 3, 4]
    recorder = Recorder()
    result = train_here(config, recorder)
    assert "going on from step 4" in recorder.messages[0]
    assert sorted(recorder.losses) == [5, 6]
    ours, theirs = metrics_lines(config), metrics_lines(undisturbed)
    assert [(line["step"], line["loss"]) for line in ours] == [
        (line["step"], line["loss"]) for line in theirs
    ]
    assert metrics_lines(config, "validation")[-1]["loss"] == result.validation_loss
    assert result.validation_loss == metrics_lines(undisturbed, "validation")[-1]["loss"]
    assert_same_tensors(tensors(config, 6), tensors(undisturbed, 6))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(tmp_path, number, code):
    config = small_config(tmp_path)
    recorder = Recorder()
    result = train_here(config, Signaller(3, number), recorder)
    assert (result.exit_code, result.stop_reason, result.step) == (code, "signal", 3)
    assert result.checkpoint is not None and result.checkpoint.endswith("step-00000003")
    assert "finishing this step and saving" in recorder.messages[-1]
    assert signal.getsignal(number) is not None
    undisturbed = elsewhere(config, tmp_path / "undisturbed")
    train_here(undisturbed)
    assert train_here(config).exit_code == 0
    assert_same_tensors(tensors(config, 6), tensors(undisturbed, 6))


def test_second_ctrl_c_stops_at_once(tmp_path):
    config = small_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_here(config, Signaller(3, signal.SIGINT, signal.SIGINT))
    assert not (tmp_path / "run" / "checkpoints" / "step-00000003").exists()


def test_finished_run_goes_on_with_a_higher_limit(tmp_path):
    config = small_config(tmp_path)
    train_here(config)
    again = train_here(config)
    assert (again.step, again.stop_reason, again.loss) == (6, "steps", None)
    longer = train_here(replace(config, stop=StopConfig(steps=8)))
    assert longer.step == 8
    assert [line["step"] for line in metrics_lines(config)] == list(range(1, 9))


def test_training_time_adds_up_over_the_parts(tmp_path):
    config = small_config(tmp_path)
    first = train_here(config).seconds
    assert train_here(replace(config, stop=StopConfig(steps=8))).seconds > first


def test_another_config_is_refused_with_all_differences(tmp_path):
    config = small_config(tmp_path)
    train_here(config)
    other = replace(config, seed=5, model=replace(config.model, hidden_size=32, activation_function="relu"))
    with pytest.raises(CheckpointError) as error:
        train_here(other)
    for text in (
        "seed was 1234 and is 5",
        "model.hidden_size was 24 and is 32",
        "model.activation_function",
    ):
        assert text in str(error.value)
    free = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-4))
    assert train_here(free).step == 6


def test_other_data_is_refused(tmp_path):
    from tests.training.helpers import write_tokens

    config = small_config(tmp_path)
    train_here(config)
    write_tokens(tmp_path / "tokens", documents=70)
    with pytest.raises(DataError):
        train_here(config)


def test_ctrl_c_reaches_the_ranks_and_all_of_them_save_once(tmp_path):
    """Two stages started by ``train``; the signal goes to the process that started them."""
    config = small_config(
        tmp_path,
        layout=LayoutConfig(pipeline_parallel_size=2),
        stop=StopConfig(steps=10**6),
        checkpoint=CheckpointConfig(interval_steps=0),
    )
    code = (
        "import pickle, sys; from mtnlg.training import loop, work;"
        "work.prepare = lambda config, progress: config;"
        "result = loop.train(pickle.load(sys.stdin.buffer));"
        "print(result.stop_reason, result.step); sys.exit(result.exit_code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, cwd=ROOT, env=environment
    ) as child:
        assert child.stdin is not None
        child.stdin.write(pickle.dumps(config))
        child.stdin.close()
        child.stdin = None
        metrics = Path(config.run_dir) / "metrics.jsonl"
        deadline = time.monotonic() + 100
        while not metrics.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors.decode()
    reason, step = output.decode().split()
    assert reason == "signal"
    saved = [path.name for path in (Path(config.run_dir) / "checkpoints").glob("step-*")]
    assert saved == [f"step-{int(step):08d}"]

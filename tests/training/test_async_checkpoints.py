"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.helpers import Recorder, small_config, train_here, train_laid_out
from tests.training.test_resume import (
    Signaller,
    assert_same_tensors,
    elsewhere,
    tensors,
    train_in_child,
)

from mtnlg.config import CheckpointConfig, LayoutConfig, StopConfig, TrainingError
from mtnlg.parallel import build_mesh
from mtnlg.training import StepMetrics, TrainingCallback
from mtnlg.training import checkpoint_files as files
from mtnlg.training.saving import CheckpointSaver
from mtnlg.training.tensor_files import TensorWriter


class Gate(TrainingCallback):
    """Holds up the writing of one checkpoint until a step is done; notes what was there by then."""

    def __init__(self, checkpoint: int, until: int, config) -> None:
        self.name, self.until = files.checkpoint_name(checkpoint), until
        self.folder = files.checkpoints_dir(config.run_dir)
        self.opened = threading.Event()
        self.seen: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.until:
            self.seen = sorted(path.name for path in self.folder.iterdir())
            self.opened.set()

    def install(self, monkeypatch) -> None:
        original = TensorWriter.write_data

        def write_data(writer, plan, planner):
            if self.name in str(writer.path):
                assert self.opened.wait(60.0)
            return original(writer, plan, planner)

        monkeypatch.setattr(TensorWriter, "write_data", write_data)


def test_checkpoint_is_of_its_step_though_training_went_on(tmp_path, monkeypatch):
    config = small_config(tmp_path, stop=StopConfig(steps=4))
    waiting = elsewhere(replace(config, checkpoint=CheckpointConfig(2, asynchronous=False)), tmp_path / "w")
    train_here(waiting)
    gate = Gate(2, until=3, config=config)
    gate.install(monkeypatch)
    train_here(config, gate)
    assert gate.seen == [".writing-step-00000002"], "there is no checkpoint before it is complete"
    for step in (2, 4):
        assert_same_tensors(tensors(config, step), tensors(waiting, step))
        files.verify_files(files.checkpoints_dir(config.run_dir) / files.checkpoint_name(step))
    assert (files.checkpoints_dir(config.run_dir) / "latest").read_text() == "step-00000004\n"


def test_weights_change_only_after_they_are_copied(tmp_path, monkeypatch):
    config = small_config(tmp_path, stop=StopConfig(steps=4))
    waiting = elsewhere(replace(config, checkpoint=CheckpointConfig(2, asynchronous=False)), tmp_path / "w")
    train_here(waiting)
    original = CheckpointSaver._copy

    def slow_copy(saver, parts):
        time.sleep(0.5)
        return original(saver, parts)

    monkeypatch.setattr(CheckpointSaver, "_copy", slow_copy)
    train_here(config)
    assert_same_tensors(tensors(config, 2), tensors(waiting, 2))


def test_one_checkpoint_is_written_at_a_time(tmp_path, monkeypatch):
    config = small_config(tmp_path, checkpoint=CheckpointConfig(1, keep_last=100))
    begun, most = [], []
    original = TensorWriter.write_data

    def write_data(writer, plan, planner):
        begun.append(writer.path)
        most.append(len(begun))
        time.sleep(0.02)
        begun.remove(writer.path)
        return original(writer, plan, planner)

    monkeypatch.setattr(TensorWriter, "write_data", write_data)
    assert train_here(config).step == 6
    assert max(most) == 1 and len(files.list_checkpoints(config.run_dir)) == 6


class Listener(Recorder):
    """Also hears of checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: list[tuple[str, int, str]] = []

    def on_checkpoint(self, path: str, step: int) -> None:
        self.checkpoints.append((Path(path).name, step, threading.current_thread().name))


def test_callbacks_hear_of_complete_checkpoints_in_the_thread_that_trains(tmp_path):
    config, listener = small_config(tmp_path), Listener()
    result = train_here(config, listener)
    here = threading.current_thread().name
    assert listener.checkpoints == [(f"step-{step:08d}", step, here) for step in (2, 4, 6)]
    assert result.checkpoint is not None and Path(result.checkpoint).name == "step-00000006"


def test_failure_in_the_background_ends_training_at_the_next_step(tmp_path, monkeypatch):
    config = small_config(tmp_path, checkpoint=CheckpointConfig(2), stop=StopConfig(steps=1000))

    def write_data(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write_data", write_data)
    recorder = Recorder()
    with pytest.raises(TrainingError, match="the disk is full"):
        train_here(config, recorder)
    assert max(recorder.losses) <= 4, "the save of step 4 at the latest finds out"
    assert list(files.checkpoints_dir(config.run_dir).iterdir()) == []


class DieWhileWriting(Signaller):
    """Kills the process after step 5, while the checkpoint of step 4 is half written."""

    def __init__(self) -> None:
        super().__init__(5, signal.SIGKILL)

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == 3:
            TensorWriter.write_data = self.write_half
        super().on_step(metrics)

    @staticmethod
    def write_half(writer, plan, planner):
        (Path(writer.path) / "half.safetensors").write_bytes(b"half")
        time.sleep(60.0)


def test_killed_while_writing_leaves_the_last_good_checkpoint(tmp_path):
    config = small_config(tmp_path)
    assert train_in_child(config, DieWhileWriting()).returncode == -signal.SIGKILL
    folder = files.checkpoints_dir(config.run_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".writing-step-00000004",
        "latest",
        "step-00000002",
    ]
    recorder = Recorder()
    train_here(replace(config, checkpoint=CheckpointConfig(0), stop=StopConfig(steps=3)), recorder)
    assert "going on from step 2" in recorder.messages[0] and sorted(recorder.losses) == [3]
    assert not list(folder.glob(".writing-*"))


def test_signal_waits_for_what_is_being_written(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    gate = Gate(2, until=3, config=config)
    gate.install(monkeypatch)
    result = train_here(config, gate, Signaller(3, signal.SIGTERM))
    assert (result.exit_code, result.step) == (143, 3)
    assert [files.step_of(path) for path in files.list_checkpoints(config.run_dir)] == [3, 2]


def test_error_in_training_leaves_the_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    class Fail(TrainingCallback):
        def on_step(self, metrics: StepMetrics) -> None:
            if metrics.step == 3:
                raise RuntimeError("out of luck")

    config = small_config(tmp_path)
    gate = Gate(2, until=3, config=config)
    gate.install(monkeypatch)
    with pytest.raises(RuntimeError, match="out of luck"):
        train_here(config, gate, Fail())
    files.verify_files(files.checkpoints_dir(config.run_dir) / files.checkpoint_name(2))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_copy_is_made_only_where_training_goes_on(tmp_path, asynchronous):
    """The tensors may change once they are copied, and memory is used again."""
    saver = CheckpointSaver(
        tmp_path,
        CheckpointConfig(asynchronous=asynchronous),
        build_mesh(LayoutConfig(data_parallel_size=1)),
    )
    weight = torch.arange(6.0)
    memories = set()
    for step in (1, 2):
        saver.save(step, {"weights": {"weight": weight}}, {})
        saver.wait_for_copy()
        memories |= {buffer.data_ptr() for buffer in saver._buffers.values()}
        weight += 10.0
    saver.wait()
    assert [step for _, step in saver.take_finished()] == [1, 2] and saver.take_finished() == []
    assert len(memories) == (1 if asynchronous else 0)
    for step in (1, 2):
        path = next((tmp_path / "checkpoints" / files.checkpoint_name(step)).rglob("*.safetensors"))
        assert torch.equal(load_file(path)["weight"], torch.arange(6.0) + 10.0 * (step - 1))


def test_ranks_write_in_the_background_too(ranks, tmp_path):
    """Messages of the background do not get between those of training."""
    layout = LayoutConfig(tensor_parallel_size=2, data_parallel_size=1)
    checkpoint = CheckpointConfig(1, keep_last=100)
    config = small_config(tmp_path, layout=layout, checkpoint=checkpoint)
    waiting = elsewhere(
        replace(config, checkpoint=replace(checkpoint, asynchronous=False)), tmp_path / "waiting"
    )
    outcomes = [ranks.run(2, train_laid_out, each)[0]["losses"] for each in (config, waiting)]
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 6
    for step in range(1, 7):
        path, other = (
            files.checkpoints_dir(each.run_dir) / files.checkpoint_name(step) for each in (config, waiting)
        )
        files.verify_files(path)
        entries, others = files.read_manifest(path), files.read_manifest(other)
        assert len(entries) == 5  # each rank its own file of weights and of the optimizer's state
        assert {n: e for n, e in entries.items() if n != files.STATE} == {
            n: e for n, e in others.items() if n != files.STATE
        }

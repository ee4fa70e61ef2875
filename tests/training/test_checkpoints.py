"""Damaged, incomplete and unwritable checkpoints: refused, passed over, and nothing lost."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.training.helpers import Recorder, small_config, train_here

from mtnlg.config import CheckpointConfig, CheckpointError, StopConfig, TrainingError
from mtnlg.training import checkpoint_files as files
from mtnlg.training import tensor_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 2, 4 and 6."""
    config = small_config(tmp_path_factory.mktemp("finished"))
    train_here(config)
    return config


@pytest.fixture
def config(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return replace(finished, run_dir=str(tmp_path / "run"))


def folder(config, step: int) -> Path:
    return files.checkpoints_dir(config.run_dir) / files.checkpoint_name(step)


def weights_file(path: Path) -> Path:
    return next((path / "weights").glob("*.safetensors"))


def flip_a_byte(path: Path) -> None:
    data = bytearray(weights_file(path).read_bytes())
    data[-5] ^= 1
    weights_file(path).write_bytes(data)


def cut_short(path: Path) -> None:
    data = weights_file(path).read_bytes()
    weights_file(path).write_bytes(data[:-100])


def lose_a_file(path: Path) -> None:
    shutil.rmtree(path / "optimizer")


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def spoil_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": [1, 2')


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": {}}')


def change_the_state(path: Path) -> None:
    state = (path / "state.json").read_text()
    (path / "state.json").write_text(state.replace('"step": 6', '"step": 7'))


DAMAGES = {
    flip_a_byte: "checksum differs",
    cut_short: "bytes, the manifest says",
    lose_a_file: "No such file",
    lose_the_manifest: "incomplete",
    spoil_the_manifest: "cannot be read",
    empty_the_manifest: "does not name state.json",
    change_the_state: "checksum differs",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_falls_back_to_the_last_good_one(config, damage):
    damage(folder(config, 6))
    recorder = Recorder()
    result = train_here(config, recorder)
    assert sorted(recorder.losses) == [5, 6]
    assert DAMAGES[damage] in recorder.messages[0] and "refused" in recorder.messages[0]
    assert "going on from step-00000004" in recorder.messages[1]
    assert result.step == 6
    files.verify_files(folder(config, 6))


@pytest.mark.parametrize("text", ["", "step-00000099\n", "../../etc\n", None])
def test_wrong_latest_pointer_is_no_harm(config, text):
    latest = files.checkpoints_dir(config.run_dir) / "latest"
    latest.unlink() if text is None else latest.write_text(text)
    recorder = Recorder()
    train_here(config, recorder)
    assert "going on from step 6" in recorder.messages[0]


def test_latest_decides_over_newer_folders(config):
    (files.checkpoints_dir(config.run_dir) / "latest").write_text("step-00000004\n")
    recorder = Recorder()
    train_here(config, recorder)
    assert sorted(recorder.losses) == [5, 6]


def test_no_good_checkpoint_is_an_error_and_not_a_new_run(config):
    for step in (2, 4, 6):
        flip_a_byte(folder(config, step))
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train_here(config)


def test_nothing_is_ever_unpickled(config, monkeypatch):
    """A pickle in place of the weights, with a manifest that vouches for it, is not executed."""

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = folder(config, 6)
    weights_file(path).write_bytes(pickle.dumps(Bomb()))
    files.write_manifest(path, {name: files.file_entry(path / name) for name in files.data_files(path)})
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(CheckpointError):
        train_here(config)


def test_weights_of_another_model_are_refused_by_name(config):
    path = folder(config, 6)
    tensors = load_file(weights_file(path))
    tensors.pop("layers.1.mlp.up.weight")
    save_file(tensors, weights_file(path))
    files.write_manifest(path, {name: files.file_entry(path / name) for name in files.data_files(path)})
    with pytest.raises(CheckpointError, match=r"does not hold layers\.1\.mlp\.up\.weight"):
        train_here(config)


def full_disk_from(step: int, monkeypatch) -> None:
    """Let every write of tensors from ``step`` on fail half-way, as on a full disk."""
    original = tensor_files.TensorWriter.write_data

    def write_data(self, plan, planner):
        if f"step-{step:08d}" in str(self.path):
            (Path(self.path) / "half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, plan, planner)

    monkeypatch.setattr(tensor_files.TensorWriter, "write_data", write_data)


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    full_disk_from(4, monkeypatch)
    with pytest.raises(TrainingError, match=r"disk is full.*step-00000002, stays"):
        train_here(config)
    root = files.checkpoints_dir(config.run_dir)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002"]
    files.verify_files(folder(config, 2))
    monkeypatch.undo()
    recorder = Recorder()
    assert train_here(config, recorder).step == 6
    assert sorted(recorder.losses) == [3, 4, 5, 6]


def test_file_size_limit_fails_like_a_full_disk(tmp_path):
    """The kernel itself refuses to write: ``RLIMIT_FSIZE`` below the size of the weights."""
    import resource
    import signal

    config = small_config(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="could not be saved"):
            train_here(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(files.checkpoints_dir(config.run_dir).iterdir()) == []


@pytest.mark.parametrize(
    ("last", "every", "kept"), [(1, 0, [6]), (2, 0, [4, 6]), (1, 2, [2, 4, 6]), (1, 4, [4, 6])]
)
def test_pruning_keeps_what_is_asked_for(tmp_path, last, every, kept):
    config = small_config(tmp_path, checkpoint=CheckpointConfig(2, keep_last=last, keep_every=every))
    leftover = files.checkpoints_dir(config.run_dir) / ".writing-step-00000001"
    leftover.mkdir(parents=True)
    train_here(config)
    found = sorted(files.step_of(path) for path in files.list_checkpoints(config.run_dir))
    assert found == kept and not leftover.exists()


def test_checkpoints_by_minutes(tmp_path):
    config = small_config(tmp_path, stop=StopConfig(steps=4))
    config = replace(config, checkpoint=CheckpointConfig(0, interval_minutes=1e-9, keep_last=100))
    train_here(config)
    assert len(files.list_checkpoints(config.run_dir)) == 4


def test_files_split_by_size_load_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 4096)
    config = small_config(tmp_path, stop=StopConfig(steps=2))
    train_here(config)
    assert len(list((folder(config, 2) / "weights").iterdir())) > 3
    assert train_here(replace(config, stop=StopConfig(steps=3))).step == 3


def test_state_is_plain_json_with_the_config(finished):
    state = json.loads((folder(finished, 6) / "state.json").read_text())
    assert (state["step"], state["samples"], state["data"]["position"]) == (6, 48, 48)
    assert state["config"]["model"]["hidden_size"] == 24

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.interop.test_hugging_face import random_model

from mtnlg.config import CheckpointError
from mtnlg.interop import fetch_from_hub, looks_like_hub_name, write_hugging_face
from mtnlg.training.model_files import open_model_files


@pytest.mark.parametrize("name", ["gpt2", "owner/model-1.5"])
def test_hub_names(name):
    assert looks_like_hub_name(name)


@pytest.mark.parametrize("name", ["/tmp/x", "./x", "runs/a/b", "../x", "", "a b"])
def test_paths(name):
    assert not looks_like_hub_name(name)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        fetch_from_hub("owner/model")


def test_without_a_network_the_error_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"owner/model.*cannot reach the hub.*or by hand: config.json"
    ):
        fetch_from_hub("owner/model")


def fake_hub(monkeypatch, tmp_path, *files):
    """A hub that has these files of every model; what was asked of it."""
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


SAFE = ["config.json", "model.safetensors"]
PICKLES = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize("there", [SAFE, PICKLES], ids=["safetensors", "bin"])
def test_pickles_are_asked_for_only_where_there_is_nothing_else(monkeypatch, tmp_path, there):
    others = ["pytorch_model.bin", "optimizer.bin"] if there == SAFE else ["training_args.bin"]
    asked = fake_hub(monkeypatch, tmp_path, *there, *others)
    assert fetch_from_hub("owner/model") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert [name for name, _ in asked] == ["owner/model"] * (1 if there == SAFE else 2)


def test_a_model_without_weights_is_no_model(monkeypatch, tmp_path):
    fake_hub(monkeypatch, tmp_path, "config.json", "flax_model.msgpack")
    with pytest.raises(CheckpointError, match=r"no model.safetensors and no pytorch_model.bin.*by hand"):
        fetch_from_hub("owner/model")


def test_a_model_of_pickles_opens_by_its_name(monkeypatch, tmp_path):
    """As it lies in the hub's cache: links in a snapshot to blobs."""
    hub = pytest.importorskip("huggingface_hub")
    model, blobs, snapshot = random_model(), tmp_path / "blobs", tmp_path / "snapshots" / "1f2e"
    write_hugging_face(model, blobs)
    torch.save(load_file(blobs / "model.safetensors"), blobs / "pytorch_model.bin")
    snapshot.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.chdir(tmp_path)
    found = open_model_files("owner/model").read()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

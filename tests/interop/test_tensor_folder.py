from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mtnlg.config import CheckpointError
from mtnlg.interop import TensorFolder, write_tensors

TENSORS = {f"t{i}": torch.randn(8, i + 1, generator=torch.Generator().manual_seed(i)) for i in range(6)}


def save_slices(folder: Path, whole: torch.Tensor, cuts: list[tuple[int, int]]) -> None:
    """As torch.distributed.checkpoint does it: each file notes where its slice belongs."""
    for number, (start, end) in enumerate(cuts):
        notes = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [start, 0]}})}
        save_file({"w": whole[start:end].contiguous()}, folder / f"{number}.safetensors", metadata=notes)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1])
def test_written_tensors_come_back(tmp_path, max_shard_bytes):
    write_tensors(tmp_path, TENSORS.items(), max_shard_bytes)
    source = TensorFolder.of_hugging_face(tmp_path)
    assert source.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name), tensor)
        assert source.shape(name) == tuple(tensor.shape)


def test_saving_again_leaves_no_stale_shards(tmp_path):
    write_tensors(tmp_path, TENSORS.items(), 200)
    write_tensors(tmp_path, [("only", torch.ones(3))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    write_tensors(tmp_path, TENSORS.items(), 200)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_failed_save_leaves_the_old_one(tmp_path):
    write_tensors(tmp_path, [("w", torch.ones(3))])

    def full_disk():
        yield "w", torch.zeros(3)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_tensors(tmp_path, full_disk(), max_shard_bytes=1)
    assert torch.equal(TensorFolder.of_hugging_face(tmp_path).read("w"), torch.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_slices_are_put_together(tmp_path):
    whole = torch.randn(10, 4)
    save_slices(tmp_path, whole, [(0, 3), (3, 4), (4, 10)])
    assert torch.equal(TensorFolder.of_folder(tmp_path).read("w"), whole)


def test_missing_slices_are_noticed(tmp_path):
    save_slices(tmp_path, torch.randn(10, 4), [(0, 3), (5, 10)])
    with pytest.raises(CheckpointError, match="slices are missing"):
        TensorFolder.of_folder(tmp_path).read("w")


def test_slices_that_torch_wrote(tmp_path):
    """One rank's part of a save by torch's own writer."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(dict(TENSORS), storage_writer=writer, no_dist=True)
    source = TensorFolder.of_folder(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
def test_tensors_of_a_pickle_are_read_and_nothing_of_it_runs(tmp_path, is_zip):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=is_zip)
    source = TensorFolder.of_hugging_face(tmp_path)
    assert source.names == set(TENSORS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(source.read("t3", lambda name, whole: whole[2:5, 1:]), TENSORS["t3"][2:5, 1:])
    evil = Evil(tmp_path / "made by a pickle")
    torch.save({**TENSORS, "evil": evil}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*mkdir"):
        TensorFolder.of_hugging_face(tmp_path)
    file.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read"):
        TensorFolder.of_hugging_face(tmp_path)
    assert not evil.path.exists()
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        TensorFolder.of_hugging_face(tmp_path)


def test_shards_of_pickles(tmp_path):
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: TENSORS[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = TensorFolder.of_hugging_face(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_other_pickles_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle.*model\.ckpt"):
        TensorFolder.of_hugging_face(tmp_path)


def test_an_empty_folder_and_a_missing_shard(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        TensorFolder.of_hugging_face(tmp_path)
    write_tensors(tmp_path, TENSORS.items(), 200)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*missing"):
        TensorFolder.of_hugging_face(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"w": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="missing"):
        TensorFolder.of_hugging_face(inside)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "\x00"])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        TensorFolder.of_hugging_face(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_never_worse(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    file = write_tensors(folder, TENSORS.items())[0]
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        source = TensorFolder.of_hugging_face(folder)
        for name in source.names:
            source.read(name)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)

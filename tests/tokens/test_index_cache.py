import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tokens.blends import data_config, numbered_documents, write_tokens

from mtnlg.tokens import samples as samples_module
from mtnlg.tokens.build_index import build_index
from mtnlg.tokens.index_cache import IndexCache
from mtnlg.tokens.stream import BatchStream


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "CACHED_FROM", 1)
    prefix = write_tokens(tmp_path / "corpus", numbered_documents([7, 30, 2] * 20))
    return data_config(prefix, split="90,10,0", sequence_length=8)


def arrays(tmp_path) -> list[Path]:
    return sorted(tmp_path.glob("corpus.index/*/*.npy"))


def test_built_ahead_and_then_only_mapped(data, tmp_path, monkeypatch):
    expected = BatchStream(data, seed=1).batch(0, 200).input_ids
    for path in tmp_path.glob("corpus.index/*/*"):
        path.unlink()
    progress = []
    report = build_index(data, seed=1, num_samples=200, progress=lambda *counts: progress.append(counts))
    assert progress == [(1, 1)]
    assert arrays(tmp_path)

    def refuse(*arguments):
        raise AssertionError("built again")

    monkeypatch.setattr(samples_module, "sample_starts", refuse)
    monkeypatch.setattr(samples_module, "document_order", refuse)
    assert torch.equal(BatchStream(data, seed=1).batch(0, 200).input_ids, expected)
    (corpus,) = report.corpora
    assert corpus.samples == report.num_samples == 200
    assert corpus.epochs == pytest.approx(200 * 8 / corpus.tokens[0])
    assert sum(corpus.tokens) == 39 * 20
    assert corpus.tokens[2] == 0
    assert corpus.split_by_documents
    assert "100.00%" in report.lines()[1]


def test_index_goes_to_the_cache_folder(data, tmp_path):
    data.cache_dir = str(tmp_path / "cache")
    build_index(data)
    assert list((tmp_path / "cache").rglob("*.npy"))
    assert not (tmp_path / "corpus.index").exists()
    assert not [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.suffix not in (".npy", ".json", "") or path.name.startswith(".")
    ]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "json"])
def test_damage_is_found_and_mended(data, tmp_path, damage, caplog):
    expected = BatchStream(data, seed=1).batch(0, 60).input_ids
    whole = {path: path.read_bytes() for path in arrays(tmp_path)}
    for path, content in whole.items():
        if damage == "cut":
            path.write_bytes(content[:-3])
        elif damage == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "gone":
            path.unlink()
    if damage == "json":
        for path in tmp_path.glob("corpus.index/*/*.json"):
            path.write_text("[1, 2")
    with caplog.at_level(logging.WARNING, "mtnlg.tokens"):
        assert torch.equal(BatchStream(data, seed=1).batch(0, 60).input_ids, expected)
    assert "damaged" in caplog.text
    assert {path: path.read_bytes() for path in arrays(tmp_path)} == whole


def test_folder_that_cannot_be_written(data, tmp_path, caplog):
    expected = BatchStream(data, seed=1).batch(0, 60).input_ids
    (tmp_path / "file").write_text("in the way")
    data.cache_dir = str(tmp_path / "file")
    assert torch.equal(BatchStream(data, seed=1).batch(0, 60).input_ids, expected)
    assert "data.cache_dir" in caplog.text


def test_full_disk_leaves_no_half_entry(tmp_path, monkeypatch, caplog):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    built = IndexCache(tmp_path / "cache").get("entry", lambda: {"numbers": np.arange(5)})
    assert built["numbers"].tolist() == [0, 1, 2, 3, 4]
    assert "No space left" in caplog.text
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def _open(folder: str, calls: str) -> int:
    def build():
        with open(calls, "a") as file:
            file.write("x")
        return {"numbers": np.arange(1000)}

    return int(IndexCache(Path(folder)).get("entry", build)["numbers"].sum())


def test_processes_that_start_together_build_once(tmp_path):
    calls = tmp_path / "calls"
    # Spawned: a fork of a process that has run much else inherits locks whose holders it has not.
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(_open, [(str(tmp_path / "cache"), str(calls))] * 12)
    assert sums == [499_500] * 12
    if os.name == "posix":
        assert len(calls.read_text()) == 1


def test_counts_of_a_long_blend_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("mtnlg.tokens.blend.BLOCK", 16)
    prefixes = [write_tokens(tmp_path / name, numbered_documents([50] * 10)) for name in "ab"]
    data = data_config(*prefixes, weights=[0.123456789, 0.9], split="90,10,0", sequence_length=8)
    build_index(data, num_samples=2000)
    stream = BatchStream(data)
    assert len(stream.blend.block_starts) == 126
    fresh = data_config(
        *prefixes,
        weights=[0.123456789, 0.9],
        split="90,10,0",
        sequence_length=8,
        cache_dir=str(tmp_path / "c"),
    )
    assert torch.equal(stream.batch(1990, 10).input_ids, BatchStream(fresh).batch(1990, 10).input_ids)

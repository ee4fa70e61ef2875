"""Views of tensors in files: right numbers, and not a byte more than they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mtnlg.config import CheckpointError
from mtnlg.interop import lazy_tensor
from mtnlg.interop.lazy_tensor import LazyTensor, join, read
from mtnlg.interop.safetensors_file import safetensors_in

WHOLE = torch.arange(6 * 4 * 5, dtype=torch.float32).reshape(6, 4, 5)


@pytest.fixture
def in_file(tmp_path):
    save_file({"before": torch.ones(3), "w": WHOLE, "half": WHOLE.to(torch.bfloat16)}, tmp_path / "f")
    return safetensors_in(tmp_path / "f")[0]


@pytest.fixture
def count(monkeypatch):
    counted = []
    original = lazy_tensor.read_bytes
    monkeypatch.setattr(
        lazy_tensor, "read_bytes", lambda *args: (counted.append(len(args[-1])), original(*args))
    )
    return counted


VIEWS = {
    "whole": lambda w: w,
    "rows": lambda w: w[2:4],
    "columns": lambda w: w[..., 1:3],
    "block": lambda w: w[1:5, 2:, 3],
    "transposed": lambda w: w.transpose(0, 2)[2:, :, 1],
    "chunk": lambda w: w.chunk(3)[1].chunk(2, dim=1)[1],
    "last chunk": lambda w: w.chunk(4)[2],
    "reshaped": lambda w: w.unflatten(0, (2, 3))[:, 1].flatten(0, 1),
    "one number": lambda w: w[3, 2, 1],
    "nothing": lambda w: w[3:3],
    "of a view": lambda w: w[1:][:, 1:][..., 1:].permute(2, 0, 1)[1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_read_exactly(in_file, count, view):
    found = view(in_file["w"])
    assert torch.equal(read(found), view(WHOLE))
    if isinstance(found, LazyTensor):
        assert sum(count) == view(WHOLE).numel() * 4


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_one_tensor(in_file, count, view, dim):
    """Of a join, too, only what a box needs is read."""
    joined = torch.cat(list(in_file["w"].chunk(2, dim)), dim)
    assert isinstance(joined, LazyTensor) and not count
    assert torch.equal(read(view(joined)), view(WHOLE))
    if view not in (VIEWS["reshaped"],):
        assert sum(count) == view(WHOLE).numel() * 4
    stacked = torch.stack([in_file["w"], in_file["w"]], dim)
    assert torch.equal(read(view(stacked.select(dim, 1))), view(WHOLE))


def test_what_is_computed_is_read(in_file):
    assert torch.equal(in_file["w"] + 1, WHOLE + 1)
    assert torch.equal(torch.zeros(6, 4, 5).copy_(in_file["w"]), WHOLE)
    assert torch.equal(in_file["w"].to(torch.float64), WHOLE.double())
    assert torch.equal(read(in_file["half"][1:]), WHOLE.to(torch.bfloat16)[1:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=4))
def test_any_slices_of_parts(cuts):
    parts = join([WHOLE[:1], WHOLE[1:4], WHOLE[4:]])
    expected = WHOLE
    for dim, begin, length in cuts:
        begin = min(begin, expected.shape[dim])
        length = min(length, expected.shape[dim] - begin)
        parts, expected = parts.narrow(dim, begin, length), expected.narrow(dim, begin, length)
    assert torch.equal(read(parts), expected)


def test_a_gap_between_parts_is_an_error():
    whole = lazy_tensor.lazy(
        lazy_tensor.Parts((4, 2), [((0, 0), torch.ones(1, 2)), ((2, 0), torch.ones(2, 2))]),
        (4, 2),
        torch.float32,
    )
    assert torch.equal(read(whole[2:]), torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="slices are missing"):
        read(whole)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": WHOLE}, path)
    tensors, _ = safetensors_in(path)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"m.safetensors: the file is cut short: \d+ bytes of \d+"):
        safetensors_in(path)
    with pytest.raises(CheckpointError, match=r"m.safetensors: the file is cut short"):
        read(tensors["w"])
    path.write_bytes(content[:5])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors_in(path)
    path.write_bytes(b"\x80\x02}q\x00." * 9)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors_in(path)

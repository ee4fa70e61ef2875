"""What a verb begins before it imports torch."""

import json
from types import SimpleNamespace

import pytest
import torch

from mtnlg import native
from mtnlg.cli import ahead
from mtnlg.generation import constraint, draws, integer_kernel, native_attention, native_step, tiled_linear

ALL = ahead.DECODER | ahead.CHOICE | ahead.TILES | ahead.INTEGERS | ahead.CODES
USUAL = {"decoder.cpp", "tiled_product.cpp", "choose.cpp", "mask.cpp"}


@pytest.fixture
def begun(monkeypatch):
    """Names of the sources that were begun."""
    found = []
    monkeypatch.setattr(native, "begin", lambda sources: found.extend(source.name for source in sources))
    monkeypatch.setattr(ahead, "GPU", ahead.KERNELS / "no such device")
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").mkdir()
    with open(tmp_path / "weights" / "model.safetensors", "wb") as file:
        file.truncate(ahead.WORTH_BEGINNING)
    return tmp_path


def arguments(model, device=None, compile="auto"):
    return SimpleNamespace(model=str(model), device=device, compile=compile)


def test_each_kernel_is_begun_as_it_is_loaded():
    kernels = [
        tiled_linear.KERNEL,
        draws.CHOOSE,
        constraint.MASK,
        native_step.KERNEL,
        native_attention.KERNEL,
    ]
    kernels += [integer_kernel.KERNEL, integer_kernel.FLOAT_KERNEL]
    assert {kernel.file: tuple(kernel.needed) for kernel in kernels} == ALL
    assert all((ahead.KERNELS / name).is_file() for name in ALL)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (dict(), USUAL),
        (dict(compile="on", device="cpu"), USUAL),
        (dict(compile="off"), set()),
        (dict(device="cuda"), set()),
    ],
)
def test_what_a_model_needs_is_begun(begun, folder, given, wanted):
    ahead.begin_kernels(arguments(folder, **given))
    assert set(begun) == wanted


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"activations": "int8"}, {"integer_product.cpp"}),
        ({"activations": "float"}, {"float_product.cpp"}),
    ],
)
def test_a_quantized_model_has_kernels_of_its_own(begun, folder, said, wanted):
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    ahead.begin_kernels(arguments(folder))
    assert set(begun) == USUAL | wanted


def test_where_nothing_is_begun(begun, folder, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text("no JSON")
    for name in (small, tmp_path / "missing", "some/name"):
        ahead.begin_kernels(arguments(name))
    monkeypatch.setattr(ahead, "GPU", ahead.KERNELS)  # something that is there
    ahead.begin_kernels(arguments(folder))
    assert begun == []
    ahead.begin_kernels(arguments(folder, device="cpu"))
    assert set(begun) == USUAL


def test_torch_leaves_the_cores_to_compilers_that_work(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = []
    for is_busy in (True, False):
        monkeypatch.setattr(native, "is_busy", lambda is_busy=is_busy: is_busy)
        with ahead.loading():
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert found == [1, 2, 2, 2]

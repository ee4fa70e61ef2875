from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.generation.test_fast_runner import FAMILIES, MakeModel, assert_near, make_prompts, rows_of

from mtnlg.generation import tiled_linear
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.huge_pages import ARENA, LargePages, use_huge_pages
from mtnlg.generation.native import NativeKernel
from mtnlg.generation.runner import PlainRunner
from mtnlg.generation.tiled_linear import TiledLinear, can_tile

needs_kernel = pytest.mark.skipif(
    tiled_linear.KERNEL.load() is None, reason="no C++ compiler, or no AVX-512"
)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (70, 33), (1, 2), (129, 96)])
@pytest.mark.parametrize("other", [None, "plus", "times"])
def test_products_are_those_of_float64(
    dtype: torch.dtype, outputs: int, inputs: int, other: str | None
) -> None:
    torch.manual_seed(outputs + inputs)
    rows = torch.randn(19, inputs).to(dtype)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    beside = torch.randn(19, outputs).to(dtype)
    product = TiledLinear(weight, None if other == "times" else bias)
    exact = rows.double() @ weight.double().T
    if other != "times":
        exact += bias.double()
    exact = {None: exact, "plus": exact + beside.double(), "times": exact * beside.double()}[other]
    for count in (1, 2, 7, 8, 9, 16, 19):
        given = {} if other is None else {other: beside[:count]}
        found = product(rows[:count], **given)
        assert found.dtype == dtype and found.shape == (count, outputs)
        # One rounding at the end: sums are kept in float32.
        tolerance = dict(rtol=5e-3, atol=1e-4) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.double(), exact[:count], **tolerance)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_numbers_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    product = TiledLinear(torch.randn(70, 40).to(dtype), torch.randn(70).to(dtype))
    rows = torch.randn(16, 40).to(dtype)
    together = product(rows)
    for first in range(16):
        for count in range(1, 17 - first):
            assert torch.equal(product(rows[first : first + count]), together[first : first + count])


def test_where_there_is_no_kernel_other_products_are_used(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = tiled_linear.KERNEL
    monkeypatch.setattr("mtnlg.native.compiler.processor", lambda: "another")
    lost = NativeKernel(kernel.file, kernel.function, kernel.arguments, kernel.needed)
    monkeypatch.setattr(tiled_linear, "KERNEL", lost)
    with caplog.at_level("INFO"):
        assert not can_tile(torch.device("cpu"), torch.float32)
    assert "avx512f" in caplog.text
    model, (prompt,) = make_model(), make_prompts([9])
    fast, plain = FastRunner(model, 6, compile="on"), PlainRunner(model, 6)
    assert_near(fast.run(rows_of([prompt])), plain.run(rows_of([prompt])), torch.float32)


# In bf16 a router may choose other experts for the last bit of its scores: experts only in float32.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt-tanh", torch.bfloat16),
        ("squared-relu", torch.float32),
        ("qwen3", torch.bfloat16),
        ("deepseek", torch.float32),
    ],
)
def test_a_few_rows_get_the_plain_numbers(make_model: MakeModel, family: str, dtype: torch.dtype) -> None:
    model = make_model(**FAMILIES[family])
    fast, plain = FastRunner(model, 6, dtype=dtype, compile="on"), PlainRunner(model, 6)
    (prompt,) = make_prompts([20])
    for start, end in ((0, 17), (17, 18), (18, 19), (19, 20)):
        row = rows_of([prompt], start, end)
        assert_near(fast.run(row), plain.run(row), dtype)


def test_weights_that_have_changed_reach_the_tiles(make_model: MakeModel) -> None:
    model = make_model()
    fast = FastRunner(model, 3, compile="on")
    row = rows_of([[5]])
    before = fast.run(row).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fast.refresh()
    after = fast.run(row)
    assert not torch.allclose(before, after)
    assert_near(after, PlainRunner(model, 3).run(row), torch.float32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has them")
def test_large_pages_leave_the_content_alone() -> None:
    memory = torch.arange(2**20)
    use_huge_pages(memory.data_ptr(), memory.nbytes)
    assert torch.equal(memory, torch.arange(2**20))
    assert not use_huge_pages(memory.data_ptr(), 100)


def test_memory_in_large_pages_is_given_out_once_and_outlives_its_arena() -> None:
    pages = LargePages()
    shapes = [(700, 1000), (3, 5), (1200, 900), (ARENA // 4 + 3,)]
    given = [pages.empty(shape, torch.float32).fill_(number) for number, shape in enumerate(shapes)]
    del pages
    for number, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
        assert tensor.shape == shape and tensor.data_ptr() % 64 == 0 and bool((tensor == number).all())


def test_a_program_may_end_while_matrices_are_moved() -> None:
    program = (
        "import time, torch\n"
        "from mtnlg.generation import huge_pages\n"
        "huge_pages.QUIET_SECONDS = 0.05\n"
        "for matrix in [torch.zeros(2**20) for _ in range(8)]:\n"
        "    huge_pages.LATER.add(matrix, matrix.data_ptr(), matrix.nbytes)\n"
        "time.sleep(0.06)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr

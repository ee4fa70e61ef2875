from __future__ import annotations

import sys

import pytest
import torch
from tests.generation.test_fast_runner import FAMILIES, MakeModel, make_prompts, rows_of
from tests.generation.test_fast_runner import close as close_to

from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.huge_pages import use_huge_pages
from mtnlg.generation.row_products import ACTIVATIONS, Product, compiled_product
from mtnlg.generation.runner import PlainRunner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "other", "has_bias"),
    [(None, "plus", True), ("gelu_tanh", None, True), ("silu", "times", False)],
)
def test_a_kernel_computes_what_it_is_for_in_float64(
    dtype: torch.dtype, activation: str | None, other: str | None, has_bias: bool
) -> None:
    row, weight, beside = (torch.randn(size).to(dtype) for size in ((1, 40), (24, 40), (1, 24)))
    bias = torch.randn(24).to(dtype) if has_bias else None
    kernel = compiled_product(Product((24, 40), dtype, has_bias, activation, other))
    found = kernel(row, weight, bias, beside if other else None)
    exact = row.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = ACTIVATIONS[activation](exact)
    exact = {None: exact, "plus": exact + beside.double(), "times": exact * beside.double()}[other]
    assert found.shape == (1, 24) and found.dtype == dtype
    # One rounding at the end: sums are kept in float32.
    torch.testing.assert_close(
        found, exact.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


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
def test_a_request_alone_gets_the_plain_numbers(
    make_model: MakeModel, family: str, dtype: torch.dtype
) -> None:
    model = make_model(**FAMILIES[family])
    fast, plain = FastRunner(model, 6, dtype=dtype, compile="on"), PlainRunner(model, 6)
    assert fast._has_row_kernels
    (prompt,) = make_prompts([20])
    for start, end in ((0, 17), (17, 18), (18, 19), (19, 20)):
        row = rows_of([prompt], start, end)
        close_to(fast.run(row), plain.run(row), dtype)


def test_weights_that_have_changed_reach_single_rows_too(make_model: MakeModel) -> None:
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
    close_to(after, PlainRunner(model, 3).run(row), torch.float32)


def test_a_deterministic_runner_keeps_to_one_kind_of_product(make_model: MakeModel) -> None:
    fast = FastRunner(make_model(), 3, deterministic=True, compile="on")
    assert not fast._has_row_kernels


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has them")
def test_large_pages_leave_the_content_alone() -> None:
    memory = torch.arange(2**20)
    use_huge_pages(memory.data_ptr(), memory.nbytes)
    assert torch.equal(memory, torch.arange(2**20))
    assert not use_huge_pages(memory.data_ptr(), 100)

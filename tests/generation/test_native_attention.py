"""Our kernel of paged attention beside the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtnlg.generation.attention_kernel import KernelShape
from mtnlg.generation.native_attention import KERNEL, native_attention
from mtnlg.generation.paged_attention import PagePool, attend_pages, attend_step

if KERNEL.load() is None:
    pytest.skip("there is no C++ compiler here", allow_module_level=True)

# (heads of keys, queries of each, dimensions): blocks of values of 16, 8, 4 and 2 dimensions
SHAPES = [(3, 1, 64), (2, 3, 32), (1, 4, 24), (2, 2, 20), (3, 1, 18), (1, 1, 128)]
LENGTHS = [33, 1, 16, 17, 160]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def make_case(
    shape: tuple[int, int, int], dtype: torch.dtype, lengths: list[int]
) -> tuple[KernelShape, Tensor, PagePool, Tensor, Tensor, Tensor, Tensor]:
    heads, queries, size = shape
    pool = PagePool(30, 16, heads, size, dtype, torch.device("cpu"))
    pool.keys.copy_(torch.randn(pool.keys.shape))
    pool.values.copy_(torch.randn(pool.values.shape))
    numbers, widest = torch.randperm(30).tolist(), -(-max(lengths) // 16)
    held = [[numbers.pop() for _ in range(-(-length // 16))] for length in lengths]
    pages = torch.tensor([own + [29] * (widest - len(own)) for own in held])
    projected = 2 * torch.randn(len(lengths) + 3, heads * (queries + 2) * size).to(dtype)
    last = torch.tensor(lengths) - 1
    new_pages = torch.tensor([own[-1] for own in held])
    kind = KernelShape(heads, queries, size, 16, dtype, "cpu")
    return kind, projected, pool, new_pages, last % 16, pages, last + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_files_and_attends_as_the_formulas_say(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    kind, projected, pool, *where = make_case(shape, dtype, LENGTHS)
    keys, values = pool.keys.clone(), pool.values.clone()
    expected = attend_step(projected.double(), keys.double(), values.double(), *where)
    found = native_attention(kind).step(projected, pool.keys, pool.values, *where)
    attend_step(projected, keys, values, *where)
    assert torch.equal(pool.keys, keys) and torch.equal(pool.values, values)
    assert (found.double() - expected).abs().max() < BOUNDS[dtype] * max(1, expected.abs().max())
    assert not found[len(LENGTHS) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_bits_depend_on_no_other_token_nor_on_threads(dtype: torch.dtype) -> None:
    kind, projected, pool, *_, pages, lengths = make_case((2, 3, 32), dtype, LENGTHS)
    query = projected[: len(LENGTHS), : 2 * 3 * 32].unflatten(1, (2, 3, 32))
    kernel = native_attention(kind)
    together = kernel.attend(query, pool.keys, pool.values, pages, lengths)
    expected = attend_pages(query.double(), pool.keys.double(), pool.values.double(), pages, lengths)
    assert (together.double() - expected).abs().max() < BOUNDS[dtype] * max(1, expected.abs().max())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for index, length in enumerate(LENGTHS):
            own = slice(index, index + 1), slice(0, -(-length // 16))
            args = query[own[0]], pool.keys, pool.values, pages[own], lengths[own[0]]
            assert torch.equal(kernel.attend(*args)[0], together[index])
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_are_none_stay_with_their_token() -> None:
    kind, projected, pool, *_, pages, lengths = make_case((2, 1, 32), torch.float32, [20, 20])
    pool.values[pages[0, 0], :, :, 3] = float("nan")
    query = projected[:2, :64].unflatten(1, (2, 1, 32))
    found = native_attention(kind).attend(query, pool.keys, pool.values, pages, lengths)
    assert found[0].isnan().all() and not found[1].isnan().any()


def test_other_pages_and_dtypes_have_no_kernel() -> None:
    assert native_attention(KernelShape(1, 1, 16, 8, torch.float32, "cpu")) is None
    assert native_attention(KernelShape(1, 1, 16, 16, torch.float64, "cpu")) is None
    assert native_attention(KernelShape(1, 1, 16, 16, torch.float32, "cuda")) is None

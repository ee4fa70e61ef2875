from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.generation.test_fast_runner import (
    BOUNDS,
    FAMILIES,
    MakeModel,
    assert_near,
    make_prompts,
    rows_of,
)

from mtnlg.generation import fast_runner, native_step
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.generation.step_plan import cut_rows
from mtnlg.generation.tiled_linear import ACTIVATIONS, TiledLinear
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS

needs_kernel = pytest.mark.skipif(
    native_step.KERNEL.load() is None, reason="no C++ compiler, or no AVX-512"
)
ONE_CALL = [
    "gpt",
    "gpt-tanh",
    "squared-relu",
    "llama",
    "part-rotary",
    "qwen2",
    "qwen3",
    "llama3",
    "gpt-neox",
]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ONE_CALL)
def test_a_step_in_one_call_is_the_plain_one(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model = make_model(**FAMILIES[family], num_hidden_layers=2)
    prompts = make_prompts([18, 17, 33, 20, 19])
    fast, plain = FastRunner(model, 15, dtype=dtype, compile="on"), PlainRunner(model, 15)
    for runner in (fast, plain):
        runner.run(rows_of([prompt[:-3] for prompt in prompts]))
    monkeypatch.setattr(fast, "_hidden", None)  # from here on it would fail
    for back in (3, 2, 1):
        rows = [own[index] for index, own in enumerate(_each(prompts, back))]
        assert_near(fast.run(rows), plain.run(rows), dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ONE_CALL)
def test_prompts_and_guesses_beside_single_tokens_take_one_call(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model = make_model(**FAMILIES[family], num_hidden_layers=2)
    prompts = make_prompts([33, 41, 30, 47, 25])
    begun, wanted = [0, 40, 27, 13, 19], [1, 1, 3, 0, 6]
    fast, plain = FastRunner(model, 15, dtype=dtype, compile="on"), PlainRunner(model, 15)
    monkeypatch.setattr(fast, "_hidden", None)
    rows = rows_of(prompts)
    before = [replace(row, ids=row.ids[:start]) for row, start in zip(rows, begun) if start]
    now = [
        replace(row, ids=row.ids[start:], start=start, num_logits=count)
        for row, start, count in zip(rows, begun, wanted)
    ]
    for step in (before, now):
        found, expected = fast.run(step), plain.run(step)
        # So many numbers have one that bf16 rounds far off: their mean error is held to the bound.
        assert (found - expected).norm() <= BOUNDS[dtype] * expected.norm()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_how_a_prompt_was_cut_nor_on_others(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = make_model(**FAMILIES["llama"])
    prompts = make_prompts([46, 21, 48])
    runner = FastRunner(model, 9, dtype=dtype, compile="on")
    expected = runner.run(rows_of(prompts))
    for most in (1, 13, 46, 67):
        monkeypatch.setattr(fast_runner, "MOST_TOKENS", most)
        assert torch.equal(runner.run(rows_of(prompts)), expected)
    for row, own in zip(rows_of(prompts, 18, num_logits=3), expected, strict=True):
        assert torch.equal(runner.run([row])[-1], own)


@needs_kernel
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hidden_states_take_one_call_too(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = make_model(**FAMILIES[family])
    fast, plain = FastRunner(model, 9, compile="on"), PlainRunner(model, 9)
    monkeypatch.setattr(fast, "_hidden", None)
    monkeypatch.setattr(fast_runner, "MOST_TOKENS", 40)
    rows = rows_of(make_prompts([30, 1, 20]))
    for found, expected in zip(fast.hidden(rows), plain.hidden(rows), strict=True):
        assert_near(found, expected)


def test_cutting_keeps_order_and_logits() -> None:
    rows = [
        Row([1, 2, 3], 7, [0], 2),
        Row([4], 0, [1], 1),
        Row([5, 6, 7, 8, 9], 2, [2], 4),
        Row([10], 5, [3], 0),
    ]
    for most in range(1, 12):
        found = list(cut_rows(rows, most))
        assert all(sum(len(row.ids) for row in some) == most for some in found[:-1])
        tokens = [
            (row.pages[0], row.start + place, token, place >= len(row.ids) - row.num_logits)
            for some in found
            for row in some
            for place, token in enumerate(row.ids)
        ]
        assert tokens == [
            (0, 7, 1, False), (0, 8, 2, True), (0, 9, 3, True), (1, 0, 4, True), (2, 2, 5, False),
            (2, 3, 6, True), (2, 4, 7, True), (2, 5, 8, True), (2, 6, 9, True), (3, 5, 10, False),
        ]  # fmt: skip


def _each(prompts: list[list[int]], back: int) -> list[list[Row]]:
    """For each prompt the rows of all, begun where its own token stands."""
    return [
        rows_of([prompt] * len(prompts), len(prompt) - back, len(prompt) - back + 1) for prompt in prompts
    ]


@needs_kernel
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ONE_CALL)))
def test_models_with_other_parts_take_their_steps_as_before(make_model: MakeModel, family: str) -> None:
    model = make_model(**FAMILIES[family])
    fast, plain = FastRunner(model, 6, compile="on"), PlainRunner(model, 6)
    for row in (rows_of([[5]]), rows_of([[5, 7]], 1)):
        assert_near(fast.run(row), plain.run(row), torch.float32)
    assert fast._native == [None]


@needs_kernel
def test_a_long_text_beside_short_ones_takes_one_call(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(max_position_embeddings=1500, num_hidden_layers=2)
    prompts, pages = make_prompts([1400, 3, 20]), [list(range(90)), [90], [91, 92]]
    fast, plain = FastRunner(model, 93, compile="on"), PlainRunner(model, 93)
    for runner in (fast, plain):
        runner.run([Row(prompt[:-1], 0, own) for prompt, own in zip(prompts, pages)])
    monkeypatch.setattr(fast, "_hidden", None)
    rows = [Row(prompt[-1:], len(prompt) - 1, own) for prompt, own in zip(prompts, pages)]
    assert_near(fast.run(rows), plain.run(rows))


@needs_kernel
def test_changed_weights_count_after_a_refresh(make_model: MakeModel) -> None:
    model = make_model()
    fast, row = FastRunner(model, 3, compile="on"), rows_of([[5]])
    before = fast.run(row).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fast.refresh()
    assert not torch.allclose(fast.run(row), before)
    assert_near(fast.run(row), PlainRunner(model, 3).run(row))


@needs_kernel
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name is not None])
def test_activations_are_those_of_float64(name: str) -> None:
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, 1e-6, -1e-6, 88.0, -88.0])])
    one = TiledLinear(torch.ones(1, 1), None)
    found = torch.cat([one(value.view(1, 1), name)[0] for value in values])
    function = ACTIVATION_FUNCTIONS.get(name) or (lambda x: x.relu().square())
    torch.testing.assert_close(found.double(), function(values.double()), rtol=1e-6, atol=1e-6)
    assert math.isnan(one(torch.full((1, 1), torch.nan), name).item())

from __future__ import annotations

import math

import pytest
import torch
from tests.generation.test_fast_runner import FAMILIES, MakeModel, assert_near, make_prompts, rows_of

from mtnlg.generation import native_step
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.few_rows import ACTIVATIONS, FewRows
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS

needs_kernel = pytest.mark.skipif(
    native_step.KERNEL.load() is None, reason="no C++ compiler, or no AVX-512"
)
ONE_CALL = ["gpt", "gpt-tanh", "squared-relu", "llama", "part-rotary", "qwen2", "llama3", "gpt-neox"]


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
    one = FewRows(torch.ones(1, 1), None)
    found = torch.cat([one(value.view(1, 1), name)[0] for value in values])
    function = ACTIVATION_FUNCTIONS.get(name) or (lambda x: x.relu().square())
    torch.testing.assert_close(found.double(), function(values.double()), rtol=1e-6, atol=1e-6)
    assert math.isnan(one(torch.full((1, 1), torch.nan), name).item())

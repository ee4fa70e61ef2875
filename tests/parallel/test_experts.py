"""Experts over ranks: load, biases, shapes, checkpoints. Gradients: tests/parallel/cases/experts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.parallel import expert_workers, workers
from tests.parallel.cases.experts import BIAS
from tests.parallel.parity import BOUND, FAMILIES, layout_fields
from tests.parallel.test_checkpoints import assert_bit_equal, merged
from tests.ranks import RankPool

from mtnlg.model.moe import grouped_product
from mtnlg.parallel.expert import kernel_product, part_experts

MODEL = FAMILIES["moe"] | BIAS

# tp, pp, dp, cp, ep: each is the source of one step and the destination of another.
CHAIN = [
    (1, 1, 1, 1, 1),
    (1, 1, 2, 1, 2),
    (2, 1, 2, 1, 2),
    (1, 1, 2, 2, 4),
    (1, 2, 2, 1, 2),
    (1, 1, 1, 1, 1),
]
WAYS: list[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = [
    ((1, 1, 2, 1, 2), {}, {"activation_recomputation": "full"}),
    ((2, 1, 1), {}, {}),
    ((1, 1, 1, 2, 2), {"data_parallel_sharding": "zero3"}, {}),
    ((1, 2, 1), {"pipeline_schedule": "zbv"}, {}),
]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, Any]:
    return ranks.run(1, expert_workers.load_of_a_step, MODEL, layout_fields(1, 1, 1), {})[0]


@pytest.mark.parametrize(("sizes", "layout", "switches"), WAYS, ids=str)
def test_every_token_is_counted_once_in_every_layout(
    ranks: RankPool,
    alone: dict[str, Any],
    sizes: tuple[int, ...],
    layout: dict[str, Any],
    switches: dict[str, Any],
) -> None:
    fields = {**layout_fields(*sizes), **layout}
    results = ranks.run(int(np.prod(sizes[:4])), expert_workers.load_of_a_step, MODEL, fields, switches)
    biases: dict[str, Any] = {}
    for result in results:
        assert result["counts"] == alone["counts"]
        assert result["losses"] == pytest.approx(alone["losses"], rel=BOUND)
        assert {sum(layer) for layer in result["counts"]} == {2.0 * result["tokens"]}
        biases |= result["biases"]
        assert all(alone["biases"][name] == bias for name, bias in result["biases"].items())
    assert biases == alone["biases"]
    assert any(any(bias) for bias in biases.values())


def test_each_rank_holds_its_part(ranks: RankPool) -> None:
    def held(*sizes: int, **layout: Any) -> dict[str, list[int]]:
        fields = {**layout_fields(*sizes), **layout}
        shapes = ranks.run(int(np.prod(sizes[:4])), expert_workers.held_by_a_rank, MODEL, fields)
        assert all(shape == shapes[0] for shape in shapes)
        return shapes[0]

    assert held(1, 1, 2, 1, 2)["down"] == [2, 24, 12]
    assert held(2, 1, 2, 1, 2) == {"gate": [2, 6, 24], "up": [2, 6, 24], "down": [2, 24, 6]}
    # One expert a rank and two replicas of it: they part its matrices instead.
    assert held(1, 1, 8, 1, 4, data_parallel_sharding="zero3")["up"] == [1, 6, 24]


def test_ranks_without_tokens_take_part(ranks: RankPool) -> None:
    one = ranks.run(1, expert_workers.nobody_chooses_a_ranks_experts, MODEL, layout_fields(1, 1, 1))
    for sharding in ("zero1", "zero3"):
        fields = {**layout_fields(1, 1, 2, 1, 2), "data_parallel_sharding": sharding}
        two = ranks.run(2, expert_workers.nobody_chooses_a_ranks_experts, MODEL, fields)
        assert two == pytest.approx([one[0]] * 2, rel=BOUND)


def test_each_step_in_another_layout_is_the_run_of_one_process(ranks: RankPool, tmp_path: Path) -> None:
    fields = {"name": "muon"}
    single = layout_fields(1, 1, 1)
    args = (MODEL, single, fields, str(tmp_path / "straight"), 0, len(CHAIN))
    straight = ranks.run(1, workers.continue_training, *args)[0]
    saved: dict[str, Any] = {}
    for step, sizes in enumerate(CHAIN):
        args = (MODEL, layout_fields(*sizes), fields, str(tmp_path / "chain"), step, 1)
        results = ranks.run(int(np.prod(sizes[:4])), workers.continue_training, *args)
        if step:
            assert_bit_equal(results, saved)
        saved = merged(results)
        assert any(name.endswith("selection_bias") for name in saved)
        for result in results:
            assert result["losses"][0] == pytest.approx(straight["losses"][step], rel=BOUND)


def test_replicas_part_experts_or_their_matrices() -> None:
    weight = torch.nn.Parameter(torch.empty(4, 6, 5))
    assert part_experts(weight, 2) is None
    assert part_experts(torch.nn.Parameter(torch.empty(4, 6)), 3) is None
    assert part_experts(weight, 7) is None, "neither divides: some hold less"
    shard = part_experts(weight, 6)
    assert shard is not None and shard.dim == 1


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [0, 0, 0, 16], [0, 0, 0, 0]])
def test_the_kernel_is_the_plain_product(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4, 8, 16, generator=generator).bfloat16().requires_grad_()
    found = []
    for product in (grouped_product, kernel_product):
        output = product(rows, weight, torch.tensor(counts))
        gradients = torch.autograd.grad(output, (rows, weight), torch.ones(len(rows), 8).bfloat16())
        found.append((output, *gradients))
    for plain, kernel in zip(*found):
        torch.testing.assert_close(kernel, plain, atol=1e-2, rtol=1e-2)

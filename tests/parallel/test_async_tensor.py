"""Asynchronous tensor parallelism: when it is on, what it is refused for, and that the compiler finds
every exchange. Whether it is fast, only GPUs can tell."""

from dataclasses import replace

import pytest
from tests.parallel import tensor_workers
from tests.ranks import RankPool

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig, TrainingConfig, layout_problems
from mtnlg.parallel import resolve_layout

MODEL = MegatronModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ASKED = LayoutConfig(tensor_parallel_size=2, data_parallel_size=1, async_tensor_parallel=True)
COMPILED = TrainingConfig(compile=True, device="cuda")


@pytest.mark.parametrize(
    ("layout", "training", "reason"),
    [
        (replace(ASKED, tensor_parallel_size=1), COMPILED, "tensor_parallel_size is 1"),
        (replace(ASKED, sequence_parallel=False), COMPILED, "needs layout.sequence_parallel"),
        (ASKED, TrainingConfig(device="cuda"), "needs training.compile"),
        (ASKED, replace(COMPILED, device="cpu"), "this run is on the CPU"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    layout: LayoutConfig, training: TrainingConfig, reason: str
) -> None:
    (problem,) = layout_problems(layout, MODEL, 8, 1, training)
    assert problem.startswith("layout.async_tensor_parallel is true") and reason in problem
    for other in (None, False):
        assert layout_problems(replace(layout, async_tensor_parallel=other), MODEL, 8, 1, training) == []


def test_what_may_be_possible_is_not_refused() -> None:
    assert layout_problems(ASKED, MODEL, 8, 1, COMPILED) == []
    assert layout_problems(ASKED, MODEL, 8, 1, replace(COMPILED, device=None)) == []


def test_a_device_that_turns_out_to_be_the_cpu_is_refused_before_ranks_start() -> None:
    with pytest.raises(ConfigError, match="this run is on the CPU"):
        resolve_layout(ASKED, "cpu")


def test_the_compiler_joins_every_exchange_with_its_product(ranks: RankPool) -> None:
    found = ranks.run(2, tensor_workers.exchanges_after_the_compiler)
    assert found == [{"gathers": 2, "scatters": 2, "left": 0}] * 2

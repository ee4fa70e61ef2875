"""What an encoder-decoder's ranks hold: by formula, and as measured."""

import pytest
import torch
from tests.parallel.parity import T5

from mtnlg.config import (
    BatchConfig,
    ConfigError,
    LayoutConfig,
    MegatronModelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from mtnlg.parallel import build_mesh, lay_out
from mtnlg.parallel.activation_meter import ActivationMeter
from mtnlg.planning import choose_layout, memory_of_rank

ROWS, SOURCE, TARGET = 2, 64, 24
WIDE = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 384}
FIXED = (SOURCE, ROWS, 4, PrecisionConfig())


def config(**fields) -> MegatronModelConfig:
    sizes = dict(hidden_size=32, head_dim=8, intermediate_size=128, activation_function="relu")
    return MegatronModelConfig(**{**T5, **sizes, **fields})


@pytest.mark.parametrize("fields", [{}, WIDE, {"num_decoder_layers": 5}])
def test_activations_are_nearly_those_that_are_kept(fields):
    model = config(**fields)
    laid_out = lay_out(model, build_mesh(LayoutConfig(data_parallel_size=1)))
    ids = torch.ones(ROWS, SOURCE, dtype=torch.long)
    with ActivationMeter() as meter:
        loss = laid_out.stages[0](ids, ids[:, :TARGET], labels=ids[:, :TARGET])
    assert loss.requires_grad
    need = memory_of_rank(LayoutConfig(), model, *FIXED, TrainingConfig(), TARGET)
    assert 0.8 < need.activations / meter.bytes < 1.25
    assert (
        need.weights
        == 4 * model.num_parameters
        == 4 * sum(parameter.numel() for _, parameter in laid_out.named_parameters())
    )


def test_division_and_recomputation_take_less():
    def bytes_of(training=None, **layout):
        need = memory_of_rank(
            LayoutConfig(**layout), config(), *FIXED, training or TrainingConfig(), TARGET
        )
        return need.activations

    one = bytes_of()
    assert bytes_of(tensor_parallel_size=2) == pytest.approx(one / 2)
    assert bytes_of(TrainingConfig(activation_recomputation="full")) < one / 3
    # Half of the layers, twice as many micro-batches in flight: what the first rank has is more than half.
    assert one / 2 < bytes_of(pipeline_parallel_size=2) < 2 * one


def test_a_layout_is_chosen_that_divides_the_target_too():
    half = memory_of_rank(LayoutConfig(tensor_parallel_size=2), config(), *FIXED, TrainingConfig(), TARGET)
    task = (config(), SOURCE, BatchConfig(ROWS, 8 * ROWS), 2, 2, 1.2 * half.total)

    def tensor_parallel(target: int) -> int | None:
        try:
            return choose_layout(*task, target_length=target)[0].tensor_parallel_size
        except ConfigError:
            return None  # nothing else fits

    assert tensor_parallel(TARGET) == 2
    assert tensor_parallel(TARGET + 1) != 2

"""What each rank runs for a case of the parity matrix."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from tests.parallel.workers import SEED, make_batches, mesh_of, share_of, whole

from mtnlg.config import MegatronModelConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model.adapters import is_of_adapter
from mtnlg.parallel import Mesh, ParallelModel, lay_out
from mtnlg.parallel.adapters import start_laid_out_adapter
from mtnlg.parallel.weights import local_slice
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer, local
from mtnlg.training.step import TrainingStep

STEPS = 3
# AdamW divides each gradient by its own size, so with its usual epsilon an element whose true gradient
# is zero would be stepped by the sign of its rounding error. This one is as large as the larger
# gradients: the step is a smooth function of the gradient, and an error of it stays an error of its size.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, epsilon=0.03, clip_grad_norm=0.5)
# Three steps of it lead an adapter, whose weights are few and count much, so far that the rounding of the
# first gradients grows: LoRA of Llama over two ranks differs by 2.3e-6 in its first gradients and by
# 2.8e-5 in its weights, by 3e-6 with a tenth of the rate, and by 5e-6 with steps that follow the gradient's
# size.
OPTIMIZER_OF_ADAPTERS = OptimizerConfig(learning_rate=1.0, epsilon=1.0, clip_grad_norm=0.5)


def run_case(
    model_fields: dict[str, Any],
    layout_fields: dict[str, Any],
    data_fields: dict[str, Any],
    precision_fields: dict[str, Any],
    switches: dict[str, Any],
    adapter_fields: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What one step gives from the first weights, and the weights after three steps of AdamW."""
    config, precision = MegatronModelConfig(**model_fields), PrecisionConfig(**precision_fields)
    mesh = mesh_of(layout_fields)
    adapter = AdapterConfig(**adapter_fields) if adapter_fields else None
    model = lay_out(config, mesh, SEED, precision, TrainingConfig(**switches), adapter)
    if adapter is not None:
        start_laid_out_adapter(model, adapter, SEED)
        move_from_the_start(model)
    weights = whole_weights(model)
    batches = make_batches(config.vocab_size, **data_fields)
    found = {"weights": weights, **first_gradients(model, mesh, batches, LossScale(precision).value)}
    model.zero_gradients()
    settings = OPTIMIZER if adapter is None else OPTIMIZER_OF_ADAPTERS
    optimizer = Optimizer(model.named_parameters(), settings)
    step = TrainingStep(model, optimizer, settings, LossScale(precision), max_skipped=0)
    outcomes = []
    for number in range(STEPS):
        batches = make_batches(config.vocab_size, **data_fields, seed=100 + number)
        outcomes.append(step.run(share_of(batches, mesh), count_valid(batches), factor=1.0))
    assert all(outcome.applied for outcome in outcomes), outcomes
    return {**found, "weights_after": whole_weights(model)}


@torch.no_grad()
def move_from_the_start(model: ParallelModel) -> None:
    """Away from zeros, where some gradients are none."""
    for name, tensor in model.state_dict().items():
        if is_of_adapter(name):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            moves = 0.1 * torch.randn(tensor.shape, generator=generator)
            local(tensor).add_(local_slice(moves, tensor))


def first_gradients(
    model: ParallelModel, mesh: Mesh, batches: list[list[Batch]], scale: float
) -> dict[str, Any]:
    """Loss, gradients and their norm of one step, and the loss of an evaluation."""
    valid = count_valid(batches)
    mine = share_of(batches, mesh)
    evaluated, counted = model.evaluate(mine)
    loss = mesh.sum_of_loss(model.forward_backward(mine, valid, scale))
    model.scale_gradients(1.0 / scale)
    return {
        "loss": loss.item(),
        "evaluated": evaluated.item(),
        "counted": counted.item(),
        "valid": valid,
        "norm": model.gradient_norm().item(),
        "gradients": {
            name: array(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


def count_valid(batches: list[list[Batch]]) -> int:
    return sum(batch.num_valid_tokens for replica in batches for batch in replica)


def whole_weights(model: ParallelModel) -> dict[str, Any]:
    """Of an adapter's model only what is trained: frozen weights are kept in the computation's dtype."""
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    weights = model.state_dict().items()
    return {name: array(weight) for name, weight in weights if model.adapter is None or name in trained}


def array(tensor: Any) -> Any:
    return whole(tensor.detach()).float().cpu().numpy().copy()

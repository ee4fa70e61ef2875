"""What the tests of activation memory run on ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from tests.parallel.workers import SEED, make_batches, mesh_of, share_of

from mtnlg.config import MegatronModelConfig, TrainingConfig
from mtnlg.parallel import ParallelModel, activation_budget, lay_out
from mtnlg.parallel.activation_memory import measure_layers


def layer_bytes(
    model: dict[str, Any], layout: dict[str, Any], switches: list[dict[str, Any]], batch: int, sequence: int
) -> list[list[int]]:
    """Bytes of each layer for each of ``switches``."""
    config, mesh = MegatronModelConfig(**model), mesh_of(layout)
    return [measure_layers(config, mesh, TrainingConfig(**each), batch, sequence) for each in switches]


def gradients_with(
    model: dict[str, Any], layout: dict[str, Any], switches: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Loss and this rank's gradients of one step with dropout, for each of ``switches``."""
    config, mesh = MegatronModelConfig(**model), mesh_of(layout)
    batches = share_of(make_batches(config.vocab_size, 2, 16, False, 2, mesh.num_replicas), mesh)
    outcomes = []
    for each in switches:
        parallel = lay_out(config, mesh, SEED, switches=TrainingConfig(**each)).train()
        parallel.seed_dropout(SEED, 3)
        loss = mesh.sum_of_loss(parallel.forward_backward(batches, 100.0)).item()
        outcomes.append({"loss": loss, **_gradients(parallel)})
    return outcomes


def _gradients(model: ParallelModel) -> dict[str, Any]:
    """What this rank holds of them."""
    return {
        name: getattr(weight.grad, "_local_tensor", weight.grad).numpy().copy()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def gradients_with_unequal_meters(
    model_fields: dict[str, Any], layout_fields: dict[str, Any], switches: list[dict[str, Any]]
) -> Any:
    """As :func:`gradients_with`, while rank 1 measures that every other level keeps twice as much."""
    measure = activation_budget.measure

    def wrong(*args: Any) -> list[activation_budget.Cost]:
        costs = measure(*args)
        return [replace(cost, kept=cost.kept * (1 + index % 2)) for index, cost in enumerate(costs)]

    if dist.get_rank() == 1:
        activation_budget.measure = wrong
    try:
        return gradients_with(model_fields, layout_fields, switches)
    finally:
        activation_budget.measure = measure

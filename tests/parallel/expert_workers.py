"""What tests of experts run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from tests.parallel.workers import SEED, make_batches, mesh_of, share_of

from mtnlg.config import MegatronModelConfig, TrainingConfig
from mtnlg.parallel import lay_out
from mtnlg.parallel.expert import mixtures


def load_of_a_step(
    model_fields: dict[str, Any], layout_fields: dict[str, Any], switches: dict[str, Any]
) -> dict[str, Any]:
    """How a step used the experts, after an evaluation and a step that must not be counted in."""
    config = MegatronModelConfig(**model_fields)
    mesh = mesh_of(layout_fields)
    model = lay_out(config, mesh, SEED, switches=TrainingConfig(**switches))
    batches = make_batches(config.vocab_size, 2, 8, False, 4, 2)
    mine = share_of(batches, mesh)
    for _ in range(2):
        model.forward_backward(mine, 100)
        model.evaluate(mine)
    load = model.expert_load()
    assert load is not None
    model.move_router_biases(load)
    biases = {name: tensor.tolist() for name, tensor in model.state_dict().items() if name.endswith("bias")}
    tokens = sum(batch.input_ids.numel() for replica in batches for batch in replica)
    return {
        "counts": load.counts.tolist(),
        "losses": [load.balance_loss, load.z_loss],
        "biases": biases,
        "tokens": tokens,
    }


def held_by_a_rank(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of this rank's part of the first experts' matrices."""
    model = lay_out(MegatronModelConfig(**model_fields), mesh_of(layout_fields))
    block = next(iter(mixtures(model.decoder).values()))
    return {
        name: list(weight.to_local().shape if hasattr(weight, "to_local") else weight.shape)
        for name, weight in block.experts.named_parameters()
    }


def nobody_chooses_a_ranks_experts(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> float:
    """Norm of the gradients when all tokens go to the experts of one rank."""
    model = lay_out(MegatronModelConfig(**model_fields), mesh_of(layout_fields), SEED)
    for block in mixtures(model.decoder).values():
        assert block.router.selection_bias is not None
        block.router.selection_bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
    batches = make_batches(model.config.vocab_size, 2, 8, False, 2, 2)
    model.forward_backward(share_of(batches, model.mesh), 10)
    return model.gradient_norm().item()

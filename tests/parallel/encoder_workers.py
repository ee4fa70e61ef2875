"""What tests of encoder-decoders run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from tests.parallel.parity import T5
from tests.parallel.workers import SEED, make_batches, mesh_of

from mtnlg.config import MegatronModelConfig
from mtnlg.parallel import lay_out


def names_of_stages(layout_fields: dict[str, Any]) -> list[list[str]]:
    """The parameters of each stage of this rank, by the plain model's names."""
    model = lay_out(MegatronModelConfig(**T5, tie_word_embeddings=False), mesh_of(layout_fields), SEED)
    return [[name for name, _ in stage.decoder.named_parameters()] for stage in model.stages]


def dropped_places(layout_fields: dict[str, Any]) -> dict[str, list[bool]]:
    """Which places of the stream, and of the columns of an MLP, this rank drops in the same step."""
    config = MegatronModelConfig(**T5, hidden_dropout=0.5)
    model = lay_out(config, mesh_of(layout_fields), SEED).train()
    layer = model.decoder.layers["0"]
    model.seed_dropout(SEED, 1)
    ones = torch.ones(64)
    return {"stream": layer.dropout(ones).bool().tolist(), "mlp": layer.mlp.dropout(ones).bool().tolist()}


def gradients_with_dropout(layout_fields: dict[str, Any], switches: list[Any]) -> list[dict[str, Any]]:
    """Gradients of one step with dropout, for each of some recomputations."""
    config = MegatronModelConfig(**T5, hidden_dropout=0.2, attention_dropout=0.2)
    mesh = mesh_of(layout_fields)
    (batches,) = make_batches(config.vocab_size, 2, 8, False, 2, 1, target=6)
    found = []
    for switch in switches:
        model = lay_out(config, mesh, SEED, switches=switch).train()
        model.seed_dropout(SEED, 1)
        model.forward_backward(batches, 10.0)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return found

"""What tests of the pipeline run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from tests.parallel.workers import SEED, make_batches, mesh_of, share_of

from mtnlg.config import LayoutConfig, MegatronModelConfig, OptimizerConfig, PrecisionConfig
from mtnlg.generation import generate
from mtnlg.parallel import lay_out, pipeline
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.samples import gather_decoder
from mtnlg.training.step import TrainingStep


def build_with_wrong_division(
    model_fields: dict[str, Any], layout_fields: dict[str, Any], rank: int, division: list[list[int]]
) -> str:
    """The error that this rank gets when one rank divides the layers its own way."""
    mesh = mesh_of(layout_fields)
    original = pipeline.layers_of_stages

    def wrong(model: MegatronModelConfig, layout: LayoutConfig) -> list[list[int]]:
        return division

    if mesh.rank == rank:
        pipeline.layers_of_stages = wrong
    try:
        lay_out(MegatronModelConfig(**model_fields), mesh, SEED)
    except AssertionError as error:
        return str(error)
    finally:
        pipeline.layers_of_stages = original
    return ""


def train_and_sample(
    model_fields: dict[str, Any], layout_fields: dict[str, Any], counts: list[int]
) -> dict[str, Any]:
    """Steps of ``counts`` micro-batches, and what is generated after them."""
    config = MegatronModelConfig(**model_fields)
    mesh = mesh_of(layout_fields)
    model = lay_out(config, mesh, SEED)
    settings = OptimizerConfig(learning_rate=0.02, epsilon=0.03)
    optimizer = Optimizer(model.named_parameters(), settings)
    step = TrainingStep(model, optimizer, settings, LossScale(PrecisionConfig()), 0)
    losses = []
    for number, count in enumerate(counts):
        batches = make_batches(config.vocab_size, 2, 8, False, count, 1, seed=number)
        valid = sum(batch.num_valid_tokens for batch in batches[0])
        losses.append(step.run(share_of(batches, mesh), valid, factor=1.0).loss)
    model.eval()
    decoder = model.decoder if model.is_whole else gather_decoder(model)
    names = [name for name, _ in model.named_parameters()]
    if decoder is None:
        return {"losses": losses, "names": names}
    with torch.no_grad():
        answers = generate(decoder, [[1, 2, 3], [30]], max_new_tokens=5)
    return {"losses": losses, "names": names, "tokens": [answer.new_ids for answer in answers]}

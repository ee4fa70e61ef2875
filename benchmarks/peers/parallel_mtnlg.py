"""This project's training step on one rank of a layout."""

from __future__ import annotations

from collections.abc import Callable

from mtnlg.config import LayoutConfig, MegatronModelConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.mesh import build_mesh
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep
from peers import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Shape, random_tokens


def build(shape: Shape, sizes: dict[str, int], micro_batches: int) -> Callable[[], float]:
    """A step over ``micro_batches`` of all replicas; sizes are of ``tensor``, ``pipeline`` and ``data``."""
    config = MegatronModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.sequence,
    )
    layout = LayoutConfig(**{f"{name}_parallel_size": size for name, size in sizes.items()})
    mesh = build_mesh(layout, "cpu")
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        clip_grad_norm=CLIP,
    )
    precision = PrecisionConfig()
    model = lay_out(config, mesh, precision=precision, switches=TrainingConfig())
    training = TrainingStep(
        model, Optimizer(model.named_parameters(), optimizer), optimizer, LossScale(precision), 10
    )
    tokens = random_tokens(shape, "cpu")
    rows = shape.batch // micro_batches
    batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(rows)]
    mine = batches[mesh.replica :: mesh.num_replicas]
    return lambda: training.run(mine, shape.tokens, 1.0).loss

"""This project: the step that ``mtnlg train`` runs, in one process."""

from __future__ import annotations

from collections.abc import Callable

from mtnlg.config import LayoutConfig, MegatronModelConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.mesh import build_mesh
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep
from peers import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Contender, Shape, random_tokens


def build(shape: Shape, precision: str, device: str, threads: int) -> Contender:
    config = MegatronModelConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.sequence,
    )
    modes = {"eager": False, "compile": True}
    steps = {mode: _lazy_step(config, shape, precision, device, compile) for mode, compile in modes.items()}
    return Contender(config.num_parameters, steps)


def _lazy_step(
    config: MegatronModelConfig, shape: Shape, precision: str, device: str, compile: bool
) -> Callable[[], float]:
    made: list[TrainingStep] = []
    tokens = random_tokens(shape, device)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def run() -> float:
        if not made:
            made.append(_training_step(config, precision, device, compile))
        return made[0].run([batch], shape.tokens, 1.0).loss

    return run


def _training_step(config: MegatronModelConfig, precision: str, device: str, compile: bool) -> TrainingStep:
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        clip_grad_norm=CLIP,
    )
    model = lay_out(
        config,
        build_mesh(LayoutConfig(), device),
        precision=PrecisionConfig(precision),
        switches=TrainingConfig(compile=compile),
    )
    scale = LossScale(PrecisionConfig(dtype=precision))
    return TrainingStep(model, Optimizer(model.named_parameters(), optimizer), optimizer, scale, 10)

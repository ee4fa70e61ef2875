"""One step: the loss rule, clipping, bad steps, fp16's loss scale."""

from __future__ import annotations

import math

import pytest
import torch

from mtnlg.config import LayoutConfig, MegatronModelConfig, OptimizerConfig, PrecisionConfig, TrainingError
from mtnlg.parallel import ParallelModel, build_mesh, lay_out
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep, split_batch

MODEL = MegatronModelConfig(
    vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
)


def make_model(precision: str = "float32") -> ParallelModel:
    mesh = build_mesh(LayoutConfig(data_parallel_size=1))
    return lay_out(MODEL, mesh, seed=1, precision=PrecisionConfig(precision)).train()


def make_step(model: ParallelModel, precision: PrecisionConfig | None = None, **fields) -> TrainingStep:
    config = OptimizerConfig(learning_rate=1e-2, **fields)
    optimizer = Optimizer(model.named_parameters(), config)
    return TrainingStep(model, optimizer, config, LossScale(precision or PrecisionConfig()), max_skipped=2)


def make_batch(rows: int = 8) -> Batch:
    """Rows with unequal numbers of valid labels."""
    ids = torch.randint(0, 23, (rows, 13), generator=torch.Generator().manual_seed(2))
    labels = ids[:, 1:].clone()
    for row in range(rows):
        labels[row, : row % 5] = IGNORED_LABEL
    return Batch(ids[:, :-1].clone(), labels)


def weights(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_accumulation_changes_nothing(micro_batch_size):
    """Micro-batches with unequal numbers of labels add up to the step of the whole batch."""
    batch, outcomes, after = make_batch(), [], []
    for size in (8, micro_batch_size):
        model = make_model()
        outcomes.append(make_step(model).run(split_batch(batch, size), batch.num_valid_tokens, 1.0))
        after.append(weights(model))
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-6)
    assert outcomes[0].gradient_norm == pytest.approx(outcomes[1].gradient_norm, rel=1e-5)
    for name, weight in after[0].items():
        # The key bias has no true gradient: AdamW turns its rounding noise into full steps.
        if "key.bias" not in name:
            torch.testing.assert_close(weight, after[1][name], rtol=1e-4, atol=2e-4)


def test_loss_is_the_mean_over_valid_tokens():
    model, batch = make_model(), make_batch()
    logits = model.eval().decoder(batch.input_ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    outcome = make_step(model).run([batch], batch.num_valid_tokens, 1.0)
    assert outcome.loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("clip", "divisor"), [(0.0, 1.0), (1e9, 1.0), (0.5, None)])
def test_clipping_divides_by_the_excess(monkeypatch, clip, divisor):
    step, batch = make_step(make_model(), clip_grad_norm=clip), make_batch()
    seen = []
    monkeypatch.setattr(step.optimizer, "step", lambda factor, scale: seen.append(scale))
    norm = step.run([batch], batch.num_valid_tokens, 1.0).gradient_norm
    assert seen == [pytest.approx(norm / 0.5 if divisor is None else divisor)]


def spoil(model: ParallelModel, monkeypatch, values: list[float]) -> None:
    """Let the first steps' gradients be multiplied by ``values``."""
    original = model.forward_backward

    def forward_backward(*args, **kwargs):
        total = original(*args, **kwargs)
        if values:
            model.scale_gradients(values.pop(0))
        return total

    monkeypatch.setattr(model, "forward_backward", forward_backward)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_changes_nothing(monkeypatch, bad):
    model, batch = make_model(), make_batch()
    step = make_step(model)
    step.run([batch], batch.num_valid_tokens, 1.0)
    before, state = weights(model), {k: v.clone() for k, v in step.optimizer.state_dict().items()}
    spoil(model, monkeypatch, [bad])
    outcome = step.run([batch], batch.num_valid_tokens, 1.0)
    assert not outcome.applied
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert all(torch.equal(state[name], tensor) for name, tensor in step.optimizer.state_dict().items())
    assert step.optimizer.steps == 1
    assert step.run([batch], batch.num_valid_tokens, 1.0).applied
    assert (step.skipped, step.skipped_in_a_row) == (1, 0)


def test_too_many_bad_steps_in_a_row_end_training(monkeypatch):
    model, batch = make_model(), make_batch()
    step = make_step(model)
    spoil(model, monkeypatch, [math.nan, math.nan, 1.0, math.nan, math.nan, math.nan])
    outcomes = [step.run([batch], batch.num_valid_tokens, 1.0).applied for _ in range(5)]
    assert outcomes == [False, False, True, False, False]
    with pytest.raises(TrainingError, match=r"3 steps in a row.*learning_rate"):
        step.run([batch], batch.num_valid_tokens, 1.0)


def test_loss_scale_doubles_and_halves():
    scale = LossScale(PrecisionConfig(dtype="fp16", initial_loss_scale=8.0, loss_scale_window=3))
    values = []
    for finite in (True, True, True, False, True, True, False, True, True, True):
        scale.update(finite)
        values.append(scale.value)
    assert values == [8, 8, 16, 8, 8, 8, 4, 4, 4, 8]
    other = LossScale(PrecisionConfig(dtype="fp16"))
    other.load_state(scale.state())
    assert (other.value, other.good_steps) == (scale.value, scale.good_steps)


def test_loss_scale_gives_up_at_its_floor():
    scale = LossScale(PrecisionConfig(dtype="fp16", initial_loss_scale=4.0, min_loss_scale=2.0))
    scale.update(False)
    with pytest.raises(TrainingError, match="fell below 2"):
        scale.update(False)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_other_formats_have_no_loss_scale(dtype):
    scale = LossScale(PrecisionConfig(dtype=dtype))
    scale.update(False)
    scale.load_state({"value": 1024.0, "good_steps": 5})
    assert scale.value == 1.0


def test_fp16_overflow_is_skipped_and_the_scale_drops():
    model, batch = make_model("fp16"), make_batch()
    step = make_step(model, PrecisionConfig(dtype="fp16", initial_loss_scale=2.0**40))
    before = weights(model)
    applied = [step.run([batch], batch.num_valid_tokens, 1.0).applied for _ in range(3)]
    assert applied == [False, False, False]  # more in a row than max_skipped allows other formats
    assert step.loss_scale.value == 2.0**37
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_stay_near_float32(precision):
    batch, losses = make_batch(), {}
    for name in ("float32", precision):
        model = make_model(name)
        step = make_step(model, PrecisionConfig(dtype=name, initial_loss_scale=1024.0))
        losses[name] = [step.run([batch], batch.num_valid_tokens, 1.0).loss for _ in range(8)]
        assert all(parameter.dtype == torch.float32 for _, parameter in model.named_parameters())
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.02)
    assert losses[precision][-1] < 0.9 * losses[precision][0]

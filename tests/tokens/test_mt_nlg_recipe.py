"""The published recipe of MT-NLG (arXiv 2201.11990, tables 1 and 2 and section 3.2) as a config."""

import math
from pathlib import Path

import pytest

from mtnlg.config.load import load_run_config
from mtnlg.tokens.blend import Blend

RECIPE = Path(__file__).parents[2] / "recipes" / "mt-nlg-530b.yaml"
# Billions of tokens of each corpus and the epochs that the paper gives for 270 billion.
PUBLISHED = [
    (25.7, 1.5), (14.8, 3.6), (11.6, 1.4), (4.4, 1.8), (4.2, 3.2), (2.7, 0.9), (1.5, 1.8), (0.3, 1.8),
    (20.8, 0.2), (24.3, 0.2), (49.8, 0.5), (68.7, 0.5), (82.6, 0.5), (21.9, 1.1), (5.3, 0.5),
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_run_config(RECIPE)


def test_the_model(recipe):
    assert recipe.model.num_parameters == pytest.approx(529.6e9, rel=1e-3)
    assert recipe.model.init_method_std is None
    assert recipe.model.vocab_size == 51_200
    assert recipe.data.sequence_length == recipe.model.max_position_embeddings == 2048


def test_the_optimizer_and_schedules(recipe):
    optimizer, schedule, batch = recipe.optimizer, recipe.schedule, recipe.batch
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (5e-5, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (0.1, 1.0)
    assert (schedule.name, schedule.warmup_tokens, schedule.decay_tokens) == ("cosine", 10**9, 340 * 10**9)
    assert schedule.min_learning_rate_ratio == 0.1
    assert (batch.ramp_start, batch.ramp_increment, batch.global_batch_size) == (32, 32, 1920)
    assert (batch.ramp_tokens, recipe.stop.tokens) == (12 * 10**9, 270 * 10**9)
    assert recipe.precision.dtype == "bf16"


def test_the_layout(recipe):
    assert recipe.layout.model_parallel_size == 280
    assert recipe.layout.num_ranks == 2240
    assert recipe.model.num_hidden_layers % recipe.layout.pipeline_parallel_size == 0


def test_the_blend(recipe):
    weights = [entry.weight for entry in recipe.data.blend]
    assert len({entry.path for entry in recipe.data.blend}) == 15
    assert math.isclose(sum(weights), 1.0, abs_tol=1e-9)
    blend = Blend(weights)
    assert blend.period == 100_000
    num_samples = recipe.stop.tokens // recipe.data.sequence_length
    for count, (billions, epochs) in zip(blend.counts(num_samples), PUBLISHED, strict=True):
        ours = count * 2048 / (0.98 * billions * 1e9)
        assert ours == pytest.approx(epochs, abs=0.15)  # the corpora's tokens are rounded to 0.1 billion

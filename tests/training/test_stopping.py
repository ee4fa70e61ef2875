"""When runs end, and how schedules follow."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
from tests.training.helpers import LENGTH, Recorder, small_config, train_here

from mtnlg.config import BatchConfig, ConfigError, EvaluationConfig, ScheduleConfig, StopConfig
from mtnlg.training import trainer
from mtnlg.training.metrics import Clock
from mtnlg.training.stopping import Position, StopRules


@pytest.mark.parametrize(
    ("config", "position", "reason"),
    [
        (StopConfig(tokens=100), Position(tokens=99), None),
        (StopConfig(tokens=100), Position(tokens=100), "tokens"),
        (StopConfig(steps=5), Position(step=5), "steps"),
        (StopConfig(minutes=0.5), Position(seconds=29.9), None),
        (StopConfig(minutes=0.5), Position(seconds=30.0), "minutes"),
        (StopConfig(tokens=100, steps=5, minutes=1), Position(1, 10, 60.0), "minutes"),
    ],
)
def test_first_limit_reached_ends_the_run(config, position, reason):
    assert StopRules(config).reason(position) == reason


def test_progress_is_that_of_the_nearest_limit():
    rules = StopRules(StopConfig(tokens=100, minutes=1))
    assert rules.progress(Position(step=1, tokens=20, seconds=30.0)) == 0.5
    assert rules.progress(Position(step=1, tokens=300, seconds=30.0)) == 1.0


def test_convergence_counts_evaluations_without_improvement():
    rules = StopRules(StopConfig(steps=1000, patience=2, margin=0.1))
    improved = [rules.observe(loss) for loss in (3.0, 2.85, 2.80, 2.6, 2.59)]
    assert improved == [True, True, False, True, False]
    assert rules.reason(Position()) is None
    rules.observe(2.55)
    assert rules.reason(Position()) == "convergence"
    other = StopRules(rules.config)
    other.load_state(rules.state())
    assert other.reason(Position()) == "convergence" and other.best_loss == 2.6


def test_without_a_token_limit_the_decay_follows_the_share_of_time():
    rules = StopRules(StopConfig(minutes=10))
    assert rules.schedule_total(10, Position()) == math.inf
    quarter = Position(step=7, tokens=900, seconds=150.0)
    assert 1000 / rules.schedule_total(1000, quarter) == pytest.approx(0.25)


def test_tokens_and_steps_end_real_runs(tmp_path):
    config = small_config(
        tmp_path, batch=BatchConfig(2, 8, ramp_start=4, ramp_increment=4, ramp_tokens=128)
    )
    result = train_here(replace(config, stop=StopConfig(tokens=10 * LENGTH)))
    # 4 sequences while fewer than 8 samples (128 tokens) are consumed, then 8 at a time
    assert (result.stop_reason, result.step, result.tokens) == ("tokens", 3, 16 * LENGTH)
    result = train_here(replace(config, stop=StopConfig(steps=4)))
    assert (result.stop_reason, result.step, result.tokens) == ("steps", 4, 24 * LENGTH)


def test_minutes_end_a_real_run_and_its_decay(tmp_path, monkeypatch):
    """Half a minute of a clock that says one second a step; the rate falls with the time."""
    ticks = itertools.count()
    clock = partial(Clock, now=lambda: float(next(ticks)))
    monkeypatch.setattr(trainer, "Clock", clock)
    config = small_config(tmp_path, stop=StopConfig(minutes=0.5))
    config = replace(config, schedule=ScheduleConfig(name="linear", min_learning_rate_ratio=0.0))
    recorder = Recorder()
    result = train_here(config, recorder)
    assert (result.stop_reason, result.seconds) == ("minutes", 30.0)
    shares = [(metrics.learning_rate / 3e-3, metrics.seconds) for metrics in recorder.steps]
    assert len(shares) == 29
    assert all(rate == pytest.approx(1.0 - seconds / 30.0) for rate, seconds in shares)
    longer = train_here(replace(config, stop=StopConfig(minutes=1.0)))
    assert (longer.step, longer.seconds) == (58, 60.0)


def test_convergence_ends_a_real_run(tmp_path):
    """With a margin that no improvement reaches, the run ends after ``patience`` more evaluations."""
    config = small_config(tmp_path, stop=StopConfig(steps=100, patience=2, margin=100.0))
    recorder = Recorder()
    result = train_here(replace(config, evaluation=EvaluationConfig(1, num_batches=1)), recorder)
    assert (result.stop_reason, result.step) == ("convergence", 3)
    assert [metrics.improved for metrics in recorder.validations] == [True, False, False]
    assert result.best_validation_loss == recorder.validations[0].loss


def test_a_run_without_any_limit_is_refused():
    with pytest.raises(ConfigError, match="tokens, steps, minutes"):
        StopConfig()

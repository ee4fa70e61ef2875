"""Schedules against their closed forms, and the batch ramp against Megatron's rule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.config import BatchConfig, ConfigError, ScheduleConfig
from mtnlg.training.schedules import BatchRamp, make_schedule

WARMUP, TOTAL, FLOOR = 1_000, 11_000, 0.1


def schedule(name: str, **fields):
    return make_schedule(
        ScheduleConfig(name=name, warmup_tokens=WARMUP, min_learning_rate_ratio=FLOOR, **fields)
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_from_zero(name):
    rule = schedule(name)
    assert [rule.factor(t, TOTAL) for t in (0, 250, 500, 999)] == [0.0, 0.25, 0.5, 0.999]
    assert rule.factor(WARMUP, TOTAL) == 1.0


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_decay_follows_closed_form(progress):
    tokens = WARMUP + progress * (TOTAL - WARMUP)
    cosine = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
    assert schedule("cosine").factor(tokens, TOTAL) == pytest.approx(cosine, rel=1e-12)
    assert schedule("linear").factor(tokens, TOTAL) == pytest.approx(1 - (1 - FLOOR) * progress)
    assert schedule("constant").factor(tokens, TOTAL) == 1.0
    decay = max(0.0, (progress - 0.8) / 0.2)
    expected = FLOOR + (1 - FLOOR) * (1 - math.sqrt(decay))
    assert schedule("wsd").factor(tokens, TOTAL) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_floor_holds_after_the_decay(name):
    assert schedule(name).factor(10 * TOTAL, TOTAL) == pytest.approx(FLOOR)


def test_unknown_end_keeps_the_peak():
    assert schedule("cosine").factor(5_000, math.inf) == 1.0


def test_mt_nlg_rate_when_it_stopped():
    """5e-5 after 1 billion tokens, cosine to 10% over 340 billion, stopped at 270 billion."""
    rule = make_schedule(ScheduleConfig(name="cosine", warmup_tokens=10**9, min_learning_rate_ratio=0.1))
    assert 5e-5 * rule.factor(270e9, 340e9) == pytest.approx(9.6e-6, rel=0.01)


def megatron_batch_size(consumed: int, start: int, increment: int, ramp_samples: int, final: int) -> int:
    """The published rule, in its own floating-point terms."""
    if consumed >= ramp_samples:
        return final
    per_increment = ramp_samples / ((final - start) / increment)
    return start + int(consumed / per_increment) * increment


def test_ramp_of_mt_nlg():
    config = BatchConfig(1, 1920, ramp_start=32, ramp_increment=32, ramp_tokens=12 * 10**9)
    ramp = BatchRamp(config, 2048)
    assert ramp.samples == 5_859_375
    assert [ramp.size(n) for n in (0, 99_311, 99_312, 5_859_374, 5_859_375)] == [32, 32, 64, 1888, 1920]
    for consumed in range(0, 6_000_000, 31_337):
        assert ramp.size(consumed) == megatron_batch_size(consumed, 32, 32, 5_859_375, 1920)


@given(st.integers(0, 4000), st.integers(1, 9))
def test_samples_after_steps_adds_up_the_sizes(steps, start):
    config = BatchConfig(1, start + 12, ramp_start=start, ramp_increment=3, ramp_tokens=500 * 8)
    ramp = BatchRamp(config, 8)
    consumed = 0
    for _ in range(steps):
        consumed += ramp.size(consumed)
    assert ramp.samples_after(steps) == consumed


def test_no_ramp_is_constant():
    ramp = BatchRamp(BatchConfig(2, 16), 8)
    assert {ramp.size(n) for n in (0, 1, 10**9)} == {16}


def test_sizes_that_do_not_divide_over_the_replicas_are_all_named():
    config = BatchConfig(2, 18, ramp_start=6, ramp_increment=6, ramp_tokens=1000)
    with pytest.raises(ConfigError) as error:
        BatchRamp(config, 8, num_replicas=4)
    assert [problem.split(" ")[0] for problem in error.value.problems] == [
        "batch.global_batch_size",
        "batch.ramp_start",
        "batch.ramp_increment",
    ]

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.tokens import blend as blend_module
from mtnlg.tokens.blend import Blend, integer_weights

MT_NLG = (
    0.14336, 0.19336, 0.05689, 0.02897, 0.04771, 0.00873, 0.01007, 0.00208,
    0.01359, 0.01588, 0.09446, 0.13017, 0.15652, 0.08962, 0.00859,
)  # fmt: skip

weight_lists = st.lists(
    st.one_of(
        st.floats(1e-6, 1.0),
        st.integers(1, 1000).map(float),
        st.decimals("0.01", "1", places=2).map(float),
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(autouse=True, scope="module")
def short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "BLOCK", 1000)
        yield


def running_counts(corpora: np.ndarray, num_corpora: int) -> np.ndarray:
    return np.cumsum(corpora[:, None] == np.arange(num_corpora), axis=0)


def worst_deviation(blend: Blend, num_samples: int) -> float:
    corpora, _ = blend.locate(0, num_samples)
    shares = np.array(blend.weights, dtype=float) / blend.period
    ideal = shares * np.arange(1, num_samples + 1)[:, None]
    return float(np.abs(running_counts(corpora, len(shares)) - ideal).max())


def largest_deficit(weights: list[float], num_samples: int) -> np.ndarray:
    """Megatron-LM's rule, written down naively."""
    shares, taken, chosen = np.array(weights) / sum(weights), np.zeros(len(weights)), []
    for step in range(num_samples):
        corpus = int(np.argmax(shares * max(step, 1) - taken))
        taken[corpus] += 1
        chosen.append(corpus)
    return np.array(chosen)


@given(weight_lists)
@settings(deadline=None, max_examples=150)
def test_every_step_is_within_one_sample_of_the_weights(weights):
    assert worst_deviation(Blend(weights), 700) <= 1 + 1e-9


def test_mt_nlg_over_more_than_a_period():
    blend = Blend(MT_NLG)
    assert blend.period == 100_000
    assert worst_deviation(blend, 130_000) <= 1
    assert blend.counts(100_000).tolist() == [round(weight * 100_000) for weight in MT_NLG]


def test_the_largest_deficit_rule_would_not_do():
    weights = [70, 20, 5, 3, 1, 1]
    ideal = np.array(weights) / 100 * np.arange(1, 101)[:, None]
    theirs = running_counts(largest_deficit(weights, 100), len(weights))
    assert np.abs(theirs - ideal).max() == pytest.approx(1.5)
    assert worst_deviation(Blend(weights), 100) < 1


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.5, 0.3, 0.2], [5, 2, 1, 1]])
def test_same_counts_as_largest_deficit_at_each_period(weights):
    blend = Blend(weights)
    theirs = np.bincount(largest_deficit(weights, blend.period), minlength=len(weights))
    assert blend.counts(blend.period).tolist() == theirs.tolist()


@given(weight_lists, st.integers(0, 3000), st.integers(1, 400))
@settings(deadline=None, max_examples=60)
def test_any_position_is_found_without_those_before(weights, start, count):
    corpora, numbers = Blend(weights).locate(0, start + count)
    late_corpora, late_numbers = Blend(weights).locate(start, count)
    assert np.array_equal(corpora[start:], late_corpora)
    assert np.array_equal(numbers[start:], late_numbers)
    for corpus in range(len(weights)):  # each corpus is counted 0, 1, 2, ...
        own = numbers[corpora == corpus]
        assert np.array_equal(own, np.arange(len(own)))
        assert Blend(weights).counts(start + count)[corpus] == len(own)


def test_long_blends_in_blocks(monkeypatch):
    whole = Blend([0.7123456789, 0.2, 0.1]).locate(0, 5000)
    monkeypatch.setattr(blend_module, "BLOCK", 64)
    blend = Blend([0.7123456789, 0.2, 0.1])
    for array, expected in zip(blend.locate(0, 5000), whole):
        assert np.array_equal(array, expected)
    resumed = Blend([0.7123456789, 0.2, 0.1], starts=blend.block_starts)
    for array, expected in zip(resumed.locate(4000, 1000), whole):
        assert np.array_equal(array, expected[4000:])


def test_far_positions_of_a_short_period_cost_nothing():
    corpora, numbers = Blend([2, 1]).locate(3 * 10**12, 3)
    assert sorted(corpora.tolist()) == [0, 0, 1]
    assert numbers.min() == 10**12


def test_weights_are_exact_decimals():
    assert integer_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert integer_weights([4, 6]) == [2, 3]
    for bad, good in itertools.product([0.0, -1.0, float("inf"), float("nan")], [1.0]):
        with pytest.raises(ValueError, match="positive"):
            integer_weights([good, bad])

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.config import ConfigError, MtnlgError
from mtnlg.generation import SamplingRules, choose_tokens, token_probabilities
from mtnlg.generation.sampling import stream_of

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0], [0.5, 0.5, 4.0, -2.0, 0.0]])


def row_generators(seed: int | None, num_rows: int) -> list[torch.Generator]:
    return [stream_of(seed, row) for row in range(num_rows)]


def reference_probabilities(logits: np.ndarray, rules: SamplingRules) -> np.ndarray:
    """The rules in float64, token by token."""
    scaled = logits.astype(np.float64) / rules.temperature
    kept = np.ones(len(scaled), bool)
    if rules.top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(rules.top_k, len(scaled)) - 1]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    if rules.top_p < 1:
        total, allowed = 0.0, set()
        for token in np.argsort(-weights, kind="stable"):
            if total >= rules.top_p:
                break
            allowed.add(token)
            total += weights[token]
        weights = np.array([w if token in allowed else 0.0 for token, w in enumerate(weights)])
    return weights / weights.sum()


def test_greedy_takes_the_most_likely():
    assert choose_tokens(LOGITS, SamplingRules(), row_generators(0, 2)).tolist() == [4, 2]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
)
def test_probabilities_equal_the_rules_in_float64(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(1, 9)).astype(np.float32) * 3
    rules = SamplingRules(temperature, top_k, top_p)
    expected = reference_probabilities(logits[0], rules)
    near_the_edge = abs(np.cumsum(np.sort(reference_probabilities(
        logits[0], SamplingRules(temperature, top_k)))[::-1]) - top_p).min() < 1e-5  # fmt: skip
    if not near_the_edge:
        found = token_probabilities(torch.from_numpy(logits), rules)[0].numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_draws_follow_the_probabilities():
    rules = SamplingRules(temperature=1.0, top_k=3)
    generators = row_generators(7, 2)
    counts = torch.zeros(2, 5)
    for _ in range(4000):
        counts[torch.arange(2), choose_tokens(LOGITS, rules, generators)] += 1
    expected = token_probabilities(LOGITS, rules)
    assert (counts / 4000 - expected).abs().max() < 0.03
    assert (counts[expected == 0] == 0).all()


def test_a_row_draws_the_same_whatever_its_neighbours():
    rules = SamplingRules(temperature=1.0)
    alone = row_generators(5, 1)
    together = row_generators(5, 2)
    first = [int(choose_tokens(LOGITS[:1], rules, alone)[0]) for _ in range(20)]
    second = [int(choose_tokens(LOGITS, rules, together)[0]) for _ in range(20)]
    assert first == second


def test_the_seed_decides():
    draw = lambda seed: [  # noqa: E731
        int(token)
        for generators in [row_generators(seed, 2)]
        for _ in range(30)
        for token in choose_tokens(LOGITS, SamplingRules(1.0), generators)
    ]
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    rules = SamplingRules(temperature=1e-30)
    assert choose_tokens(LOGITS * 1e4, rules, row_generators(0, 2)).tolist() == [4, 2]


def test_options_left_out_mean_greedy_and_any_option_samples():
    assert SamplingRules.from_options().is_greedy
    assert SamplingRules.from_options(top_k=5) == SamplingRules(1.0, 5)
    assert SamplingRules.from_options(seed=1) == SamplingRules(1.0, seed=1)
    assert SamplingRules.from_options(temperature=0.0, top_p=0.9).is_greedy


def test_every_bad_value_is_named():
    with pytest.raises(ConfigError) as caught:
        SamplingRules(temperature=-1, top_k=-2, top_p=0.0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["temperature", "top_k", "top_p"]
    with pytest.raises(ConfigError, match="seed is -1"):
        row_generators(-1, 1)


@pytest.mark.parametrize("rules", [SamplingRules(), SamplingRules(1.0)])
def test_logits_that_are_not_numbers_are_refused(rules):
    with pytest.raises(MtnlgError, match="not finite"):
        choose_tokens(torch.full((1, 4), float("nan")), rules, row_generators(0, 1))


NUMBERS = [
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
]
COUNTS = ["top_k", "no_repeat_ngram_size", "seed"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -3.0, True, "hot", None])
def test_a_number_that_is_none_or_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        SamplingRules(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [float("nan"), 1.5, -1, True, "3"])
def test_a_count_that_is_none_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        SamplingRules(**{name: value})


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (((3, float("nan")),), "token 3 is nan"),
        (((3, float("inf")),), "token 3 is inf"),
        (((3, 1e7),), "from -1e6 to 1e6"),
        (((-1, 1.0),), "token -1"),
        (((2.5, 1.0),), "token 2.5"),
        (((3, 1.0), (3, 2.0)), "twice"),
    ],
)
def test_a_bias_that_cannot_be_added_is_refused(bias, said):
    with pytest.raises(ConfigError, match=said):
        SamplingRules(logit_bias=bias)


def test_all_options_reach_the_rules():
    options = dict(min_p=0.1, typical_p=0.9, repetition_penalty=1.1, frequency_penalty=0.2,
                   presence_penalty=-0.3, no_repeat_ngram_size=2, top_k=3, top_p=0.8, seed=5)  # fmt: skip
    rules = SamplingRules.from_options(0.7, **options, logit_bias={4: 1.0, 2: -float("inf")})
    assert {name: getattr(rules, name) for name in options} == options
    assert rules.temperature == 0.7 and rules.logit_bias == ((4, 1.0), (2, -float("inf")))
    assert SamplingRules.from_options(repetition_penalty=1.2).is_greedy
    assert SamplingRules.from_options(min_p=0.1).temperature == 1.0

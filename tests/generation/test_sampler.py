from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.generation import SamplingRules, draws
from mtnlg.generation.distribution import inverse_transform, row_probabilities
from mtnlg.generation.sampler import SamplingState, distributions, sample, token_logprobs
from mtnlg.generation.sampling import stream_of


def make_state(rules: SamplingRules, row: int = 0, **fields) -> SamplingState:
    return SamplingState(rules, [1, 2, 3], stream_of(7, row), **fields)


def logits_of(seed: int, rows: int, vocab: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def tokens_of(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return [sampled.token for sampled in sample(logits.clone(), states)]


# -- in distribution

# Rules, vocabulary and how many draws; those that look at one row after another take longer.
COMBINATIONS = {
    "temperature": (SamplingRules(0.7), 40, 100),
    "top-p": (SamplingRules(1.3, top_p=0.8), 40, 20),
    "small top-p": (SamplingRules(1.0, top_p=0.2), 40, 20),
    "top-k and top-p from all": (SamplingRules(0.9, 12, 0.9), 40, 20),
    "top-k, top-p and min-p from candidates": (SamplingRules(1.1, 8, 0.95, min_p=0.01), 2600, 100),
    "min-p": (SamplingRules(1.0, min_p=0.1), 40, 20),
    "typical": (SamplingRules(1.0, typical_p=0.7), 40, 10),
    "typical of a nucleus": (SamplingRules(1.0, 30, 0.9, min_p=0.01, typical_p=0.8), 40, 4),
    "all rules": (
        SamplingRules(1.2, 0, 0.9, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2,
                      no_repeat_ngram_size=2, logit_bias=((5, 1.0), (6, -math.inf))),
        40,
        100,
    ),
}  # fmt: skip


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic is from its mean, by Wilson and Hilferty (1931)."""
    order = np.argsort(expected)
    expected, counts = expected[order], counts[order]
    rare = expected.cumsum() < 10  # together they make one class
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    known = expected > 0
    statistic = ((counts[known] - expected[known]) ** 2 / expected[known]).sum()
    freedom = max(1, known.sum() - 1)
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_draws_follow_the_rules_in_distribution(name):
    draws.load_kernels()
    rules, vocab, rounds = COMBINATIONS[name]
    rows = 1000
    logits = logits_of(3, 1, vocab)
    states = [make_state(rules, row, new_ids=[4, 4, 9, 3]) for row in range(rows)]
    expected = distributions(logits.clone(), states[:1])[0].double().numpy() * rounds * rows
    many = logits.expand(rows, -1).contiguous()
    counts = np.zeros(vocab)
    for _ in range(rounds):
        counts += np.bincount(tokens_of(many, states), minlength=vocab)
    assert counts.sum() == rounds * rows
    assert (counts[expected == 0] == 0).all()
    assert chi_square(counts, expected) < 4


def test_the_test_of_distributions_sees_a_small_error():
    expected = np.full(20, 5000.0)
    wrong = np.random.default_rng(0).multinomial(100_000, np.linspace(0.95, 1.05, 20) / 20)
    right = np.random.default_rng(0).multinomial(100_000, np.full(20, 0.05))
    assert chi_square(wrong, expected) > 4 > chi_square(right, expected)


# -- each row for itself

rules_of_any_kind = st.builds(
    SamplingRules,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1e-30, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 300]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.6]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2]),
    logit_bias=st.sampled_from([(), ((4, 3.0), (5, -math.inf))]),
)


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(rules_of_any_kind, min_size=2, max_size=6),
    seed=st.integers(0, 999),
    vocab=st.sampled_from([7, 300, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),  # in bf16 many are tied
)
def test_a_row_gets_the_same_tokens_alone_and_among_others(rules, seed, vocab, dtype):
    logits = logits_of(seed, len(rules), vocab).to(dtype).float()
    make = lambda: [make_state(rule, row, end_ids=[0], min_new_tokens=2) for row, rule in enumerate(rules)]  # noqa: E731
    together, alone = make(), make()
    for _ in range(3):
        found = tokens_of(logits, together)
        assert found == [tokens_of(logits[row : row + 1], [state])[0] for row, state in enumerate(alone)]
        for token, states in ((token, pair) for token, pair in zip(found, zip(together, alone))):
            for state in states:
                state.accept(token)


@settings(max_examples=60, deadline=None)
@given(rules=rules_of_any_kind, seed=st.integers(0, 999), vocab=st.sampled_from([7, 300, 5000]))
def test_probabilities_sum_to_one_and_a_token_ruled_out_is_never_drawn(rules, seed, vocab):
    logits = logits_of(seed, 1, vocab)
    states = [make_state(rules, row, end_ids=[0], min_new_tokens=2) for row in range(8)]
    probabilities = distributions(logits.clone(), states[:1])[0]
    assert float(probabilities.double().sum()) == pytest.approx(1.0, abs=1e-5)
    assert probabilities[0] == 0
    if rules.logit_bias:
        assert probabilities[5] == 0
    drawn = tokens_of(logits.expand(8, -1), states)
    assert (probabilities[drawn] > 0).all()


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("top_k", [3, 7])
def test_tokens_tied_with_the_last_one_are_all_drawn(vocab, top_k):
    """As logits in bf16 often are, more than there is room for among the candidates too."""
    num_tied = 60 if vocab > 100 else 20
    logits = torch.full((1, vocab), -5.0)
    logits[0, :num_tied] = 1.0
    rules = SamplingRules(1.0, top_k)
    states = [make_state(rules, row) for row in range(1500)]
    assert set(tokens_of(logits.expand(1500, -1), states)) == set(range(num_tied))


def test_the_stream_goes_on_and_the_seed_decides():
    logits = logits_of(1, 1, 50)
    draw = lambda seed: [  # noqa: E731
        tokens_of(logits, [state])[0]
        for state in [SamplingState(SamplingRules(1.0), [1], stream_of(seed, 0))]
        for _ in range(60)
    ]
    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_streams_differ_and_do_not_depend_on_how_many_there_are():
    first = [torch.rand(1, generator=stream_of(5, number)).item() for number in range(100)]
    assert len(set(first)) == 100
    assert first[7] == torch.rand(1, generator=stream_of(5, 7)).item()


# -- errors


@pytest.mark.parametrize("rules", [SamplingRules(), SamplingRules(1.0), SamplingRules(1.0, 5, 0.9)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_end_only_their_own_row(rules, bad):
    logits = logits_of(0, 3, 5000)
    expected = tokens_of(logits, [make_state(rules, row) for row in range(3)])
    logits[1] = bad
    logits[1, :100] = bad
    found = sample(logits, [make_state(rules, row) for row in range(3)])
    assert found[1].token == -1 and "not finite" in (found[1].error or "")
    assert [found[0].token, found[2].token] == [expected[0], expected[2]]
    assert found[0].error is None is found[2].error


def test_one_stray_nan_is_enough():
    logits = logits_of(0, 1, 100)
    logits[0, 60] = math.nan
    assert sample(logits, [make_state(SamplingRules())])[0].error


def test_rules_that_leave_nothing_say_so():
    everything = tuple((token, -math.inf) for token in range(6))
    found = sample(
        logits_of(0, 2, 6), [make_state(SamplingRules(logit_bias=everything)), make_state(SamplingRules())]
    )
    assert "logit_bias" in (found[0].error or "") and found[1].error is None


def test_huge_and_tiny_settings_do_not_overflow():
    logits = torch.tensor([[1e30, -1e30, 5.0, 1e30 / 2]])
    for rules in (SamplingRules(1e-30), SamplingRules(1e300), SamplingRules(1.0, repetition_penalty=1e-300),
                  SamplingRules(repetition_penalty=1e300), SamplingRules(5e-324, 2, 0.5)):  # fmt: skip
        found = sample(logits.clone(), [make_state(rules, new_ids=[0, 1, 3])])[0]
        assert found.error is None and 0 <= found.token < 4


# -- the ways to them

# Shares that a few equal ones do not add up to: there, rounding would decide.
rules_of_chance = st.builds(
    SamplingRules,
    temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 300]),
    top_p=st.sampled_from([1.0, 0.95, 0.31]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.61, 0.11]),
)


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """Both ways in which tokens are drawn on a CPU."""
    draws.load_kernels()
    if request.param == "numpy":
        monkeypatch.setattr(draws.CHOOSE, "_loaded", [])
        monkeypatch.setattr(draws.LIKELIEST, "_loaded", [])
        monkeypatch.setattr(draws, "SMALL", 0)
    elif draws.CHOOSE.loaded is None:
        pytest.skip("there is no compiler")


@pytest.mark.parametrize("vocab", [1, 7, 300, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bf16 many are tied
def test_a_random_number_leads_to_the_token_that_the_definition_says(way, vocab, dtype):
    @settings(max_examples=25, deadline=None)
    @given(
        rules=st.lists(rules_of_chance, min_size=1, max_size=5),
        seed=st.integers(0, 999),
        scale=st.sampled_from([0.5, 6.0]),
        ruled_out=st.sampled_from([None, 2, 3]),
    )
    def check(rules, seed, scale, ruled_out):
        logits = logits_of(seed, len(rules), vocab, scale).to(dtype).float()
        if ruled_out is not None:
            logits[:, 1::ruled_out] = -math.inf
        shares = torch.from_numpy(np.random.default_rng(seed).random(len(rules)))
        expected = row_probabilities(logits, rules)
        best, tokens = draws.choose(logits, rules, shares.tolist())
        assert best == logits.amax(dim=-1).tolist()
        assert tokens == inverse_transform(expected, shares).tolist()
        found = draws.probabilities(logits, rules)
        differing = ((found > 0) != (expected > 1e-37)).sum(dim=-1)
        assert differing.max() <= (vocab > 1000)  # at a border between thousands, rounding may decide
        torch.testing.assert_close(found[differing == 0], expected[differing == 0], atol=1e-6, rtol=1e-4)

    check()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), length=st.integers(1, 3000), share=st.floats(0.01, 1.0))
@pytest.mark.usefixtures("way")
def test_the_most_likely_are_those_of_a_sort(seed, length, share):
    scores = logits_of(seed, 3, length)
    count = max(1, min(length, int(share * min(length, 200))))
    scores[0, length // 2 + 1 :] = -math.inf
    scores[1] = scores[1].round()  # many are tied
    totals, values, ids = draws.likeliest(scores, count)
    assert values == scores.sort(dim=-1, descending=True).values[:, :count].tolist()
    assert torch.equal(scores.gather(1, torch.tensor(ids)), torch.tensor(values))
    assert totals == pytest.approx(scores.double().logsumexp(dim=-1).tolist(), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    number=st.sampled_from([0.0, 0.25, 0.5, 1 - 2.0**-32]),
    length=st.integers(1, 900),
    hole=st.integers(0, 899),
)
def test_a_draw_never_hits_a_weight_of_zero(number, length, hole):
    weights = np.zeros(length, dtype=np.float32)
    weights[min(hole, length - 1)] = 1e-20
    assert draws.draw_by_share(weights, number) == min(hole, length - 1)


# -- log probabilities


def test_logprobs_are_the_models_own_whatever_the_rules():
    logits = logits_of(4, 3, 700)
    rules = SamplingRules(0.5, 3, repetition_penalty=5.0, logit_bias=((9, 100.0),))
    states = [make_state(rules, row, num_logprobs=number) for row, number in enumerate([4, None, 0])]
    found = sample(logits.clone(), states)
    expected = logits.double().log_softmax(dim=-1)
    assert found[1].logprobs is None
    for row in (0, 2):
        assert found[row].token == 9
        assert found[row].logprobs.logprob == pytest.approx(float(expected[row, 9]), abs=1e-5)
    best = expected[0].topk(4)
    assert [token for token, _ in found[0].logprobs.top] == best.indices.tolist()
    assert [value for _, value in found[0].logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert found[2].logprobs.top == ()


def test_logprobs_are_those_before_the_temperature():
    logits = logits_of(4, 4, 700)
    states = [make_state(SamplingRules(0.3), row, num_logprobs=1) for row in range(4)]
    expected = logits.double().log_softmax(dim=-1)
    for row, found in enumerate(sample(logits.clone(), states)):
        assert found.logprobs.logprob == pytest.approx(float(expected[row, found.token]), abs=1e-5)


def test_logprobs_of_one_place():
    logits = torch.tensor([0.0, math.log(3.0)])
    found = token_logprobs(logits, 0, 5)
    assert found.logprob == pytest.approx(math.log(0.25))
    assert found.top == ((1, pytest.approx(math.log(0.75))), (0, pytest.approx(math.log(0.25))))
    assert token_logprobs(logits, 0, None) is None

"""Every rule beside transformers' processor of the same name, on the same scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.generation import SamplingRules
from mtnlg.generation.distribution import row_probabilities
from mtnlg.generation.draws import load_kernels
from mtnlg.generation.penalties import PENALISE, edit_scores
from mtnlg.generation.sampler import SamplingState, distributions
from mtnlg.generation.sampling import stream_of

logits_process = pytest.importorskip("transformers.generation.logits_process")

VOCAB = 40
LOOK_BACK = {
    "sequence_bias": lambda v: logits_process.SequenceBiasLogitsProcessor(v),
    "repetition_penalty": lambda v: logits_process.RepetitionPenaltyLogitsProcessor(v),
    "no_repeat_ngram_size": lambda v: logits_process.NoRepeatNGramLogitsProcessor(v),
    "min_new_tokens": lambda v: logits_process.MinNewTokensLengthLogitsProcessor(*v),
}
WARPERS = {
    "temperature": lambda v: logits_process.TemperatureLogitsWarper(v),
    "top_k": lambda v: logits_process.TopKLogitsWarper(v),
    "top_p": lambda v: logits_process.TopPLogitsWarper(v),
    "min_p": lambda v: logits_process.MinPLogitsWarper(v),
    "typical_p": lambda v: logits_process.TypicalLogitsWarper(v),
}


def make_state(rules, prompt, new=(), **fields) -> SamplingState:
    return SamplingState(rules, prompt, stream_of(0), new_ids=list(new), **fields)


def scores_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3)


def edited(scores, states) -> torch.Tensor:
    scores = scores.clone()
    edit_scores(scores, states)
    return scores


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def way(request):
    """Both ways in which tokens that were there are penalised on a CPU."""
    load_kernels()
    loaded = PENALISE.loaded
    if request.param == "compiled" and loaded is None:
        pytest.skip("there is no compiler")
    PENALISE._loaded = [loaded if request.param == "compiled" else None]
    yield
    PENALISE._loaded = [loaded]


ids = st.lists(st.integers(0, 5), min_size=1, max_size=40)  # few different ones, so that they repeat


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    prompt=ids,
    new=st.lists(st.integers(0, 5), max_size=20),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
    ngram=st.integers(0, 4),
    least=st.integers(0, 25),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
)
def test_rules_that_look_back_give_the_same_numbers(seed, prompt, new, penalty, ngram, least, bias):
    """Together and in transformers' order, bit for bit."""
    scores = scores_of(seed)
    rules = SamplingRules(
        repetition_penalty=penalty, no_repeat_ngram_size=ngram, logit_bias=tuple(bias.items())
    )
    found = edited(scores, [make_state(rules, prompt, new, end_ids=[3, 7], min_new_tokens=least)])
    options = {
        "sequence_bias": {(token,): value for token, value in bias.items()},
        "repetition_penalty": penalty,
        "no_repeat_ngram_size": ngram,
        "min_new_tokens": (len(prompt), least, [3, 7]),
    }
    expected = scores.clone()
    for name, make in LOOK_BACK.items():
        if options[name] and (name, options[name]) != ("repetition_penalty", 1.0):
            expected = make(options[name])(torch.tensor([[*prompt, *new]]), expected)
    assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 25, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.4, 0.1]),
)
def test_rules_that_truncate_keep_the_same_tokens(seed, temperature, top_k, top_p, min_p, typical_p):
    scores = scores_of(seed, rows=3)
    rules = SamplingRules(temperature, top_k, top_p, None, min_p, typical_p)
    found = row_probabilities(scores, [rules] * 3)
    expected = scores
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in {**options, "typical_p": typical_p}.items():
        if value and (name, value) not in (("top_p", 1.0), ("typical_p", 1.0)):
            expected = WARPERS[name](value)(None, expected)
    expected = expected.softmax(dim=-1)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


def test_a_large_vocabulary_is_cut_at_the_same_token():
    scores = scores_of(5, rows=4, vocab=50257)
    for name, value in (("top_k", 321), ("top_p", 0.93), ("min_p", 0.03), ("typical_p", 0.8)):
        found = row_probabilities(scores, [SamplingRules(1.0, **{name: value})] * 4) > 0
        expected = WARPERS[name](value)(None, scores) > -math.inf
        # Sums of 50,257 float32 are rounded differently; a token or two of thousands at the edge.
        assert (found != expected).sum() <= (8 if name in ("top_p", "typical_p") else 0)


def test_frequency_and_presence_penalties_are_as_openai_defines_them():
    """logit -= count * frequency + (count > 0) * presence, over generated tokens only."""
    scores = scores_of(1)
    rules = SamplingRules(frequency_penalty=0.5, presence_penalty=-0.3)
    found = edited(scores, [make_state(rules, [1, 2, 3], [3, 3, 9])])
    expected = scores.clone()
    expected[0, 3] = expected[0, 3] - 2 * 0.5 + 0.3
    expected[0, 9] = expected[0, 9] - 0.5 + 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_with_different_rules_do_not_touch_each_other():
    scores = scores_of(2, rows=4)
    states = [
        make_state(SamplingRules(repetition_penalty=1.5), [1, 2], [3]),
        make_state(SamplingRules(), [1, 2]),
        make_state(SamplingRules(presence_penalty=1.0, logit_bias=((5, -math.inf),)), [1], [2]),
        make_state(SamplingRules(no_repeat_ngram_size=1), [4, 5], end_ids=[0], min_new_tokens=1),
    ]
    together = edited(scores, states)
    for row, state in enumerate(states):
        assert torch.equal(together[row], edited(scores[row : row + 1], [state])[0])
    assert torch.equal(together[1], scores[1])
    assert together[3, [0, 4, 5]].tolist() == [-math.inf] * 3


def test_what_is_kept_token_by_token_equals_what_is_counted_at_once():
    rng = np.random.default_rng(0)
    rules = SamplingRules(
        repetition_penalty=1.2, frequency_penalty=0.1, presence_penalty=0.2, no_repeat_ngram_size=3
    )
    tokens = rng.integers(0, 300, size=400).tolist()  # more different ones than the arrays begin with
    state = make_state(rules, tokens[:50])
    scores = scores_of(3, vocab=300)
    for place, token in enumerate(tokens[50:], start=50):
        state.accept(token)
        if place % 50 == 0:
            at_once = make_state(rules, tokens[:50], tokens[50 : place + 1])
            assert torch.equal(edited(scores, [state]), edited(scores, [at_once]))


def test_a_forked_state_goes_its_own_way():
    rules = SamplingRules(repetition_penalty=1.2, frequency_penalty=0.1, no_repeat_ngram_size=2)
    state = make_state(rules, [1, 2], [3])
    other = state.fork()
    other.accept(2)
    other.accept(1)
    scores = scores_of(4)
    assert torch.equal(edited(scores, [state]), edited(scores, [make_state(rules, [1, 2], [3])]))
    assert torch.equal(edited(scores, [other]), edited(scores, [make_state(rules, [1, 2], [3, 2, 1])]))


class Even:
    """A constraint that allows even tokens."""

    is_complete = False

    def fill_mask(self, bitmask):
        bitmask.fill_(0x55555555)

    def accept(self, token):
        assert token % 2 == 0

    def copy(self):
        return self


def test_a_constraint_rules_out_every_other_token():
    scores = scores_of(6, rows=2, vocab=67)
    found = distributions(
        scores.clone(),
        [make_state(SamplingRules(1.0), [1], constraint=Even()), make_state(SamplingRules(1.0), [1])],
    )
    assert (found[0, 1::2] == 0).all() and (found[0, ::2] > 0).all() and (found[1] > 0).all()
    torch.testing.assert_close(found[0, ::2], scores[0, ::2].softmax(-1))

from __future__ import annotations

import math

import pytest

from mtnlg.generation import Generation, GenerationRequest, TokenEvent, TokenLogprobs
from mtnlg.generation.samples import best_samples, mean_logprob


def generation(*logprobs: float) -> Generation:
    found = Generation(GenerationRequest([1]))
    for logprob in logprobs:
        found.put(TokenEvent(2, logprobs=TokenLogprobs(logprob)))
    found.put(TokenEvent(None, finish_reason="length"))
    return found


def test_the_likeliest_on_average_come_first_and_earlier_ones_at_a_tie():
    few = generation(-0.5)
    first, second = generation(-1.0, -1.0), generation(-1.0)
    worst, none = generation(-0.1, -3.0), generation()
    assert best_samples([worst, first, none, second, few], 3) == [few, first, second]


def test_all_of_them_stay_in_order():
    several = [generation(-2.0), generation(-1.0)]
    assert best_samples(several, 2) == several


def test_the_mean_counts_tokens():
    assert mean_logprob(generation(-1.0, -2.0)) == pytest.approx(-1.5)
    assert mean_logprob(generation()) == -math.inf

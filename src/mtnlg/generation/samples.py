"""The best of several continuations of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from mtnlg.generation.request import Generation


def best_samples(generations: Sequence[Generation], count: int) -> list[Generation]:
    """The finished generations whose tokens were likeliest on average, best first.

    Args:
        generations: with log-probabilities; of equal ones the earlier is the better.
        count: how many are wanted; where that is all of them they stay as they are.
    """
    if len(generations) <= count:
        return list(generations)
    return sorted(generations, key=mean_logprob, reverse=True)[:count]


def mean_logprob(generation: Generation) -> float:
    """The mean of the log-probabilities of a generation's new tokens; minus infinity of none."""
    known = [found.logprob for found in generation.logprobs if found.logprob is not None]
    return sum(known) / len(known) if known else float("-inf")

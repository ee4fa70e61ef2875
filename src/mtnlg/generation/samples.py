"""Several continuations of one prompt, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mtnlg.config.errors import ConfigError
from mtnlg.generation.request import Generation, GenerationRequest

Submit = Callable[[GenerationRequest], Generation]


def submit_samples(
    submit: Submit, request: GenerationRequest, n: int = 1, best_of: int | None = None
) -> list[Generation]:
    """Ask for several continuations of the same prompt.

    Each draws from a stream of its own, decided by the request's seed and its number: the first is what
    the request alone would give, and asking for more changes none of those before.

    Args:
        submit: ``Engine.submit``.
        request: the prompt and its rules.
        n: continuations wanted.
        best_of: continuations made, of which :func:`best_samples` takes the ``n`` best; ``None`` is
            ``n``.

    Returns:
        ``best_of`` generations, all in the engine.

    Raises:
        ConfigError: ``n`` or ``best_of`` is out of range, or the engine refuses the request.
    """
    count = check_counts(n, best_of)
    if best_of is not None and request.logprobs is None:
        request = replace(request, logprobs=0)  # what they are ranked by
    generations: list[Generation] = []
    try:
        for index in range(count):
            generations.append(submit(replace(request, stream=request.stream + index)))
    except BaseException:  # all or none: half of them are of no use to anybody
        for generation in generations:
            generation.cancel()
        raise
    return generations


def check_counts(n: int, best_of: int | None) -> int:
    """How many continuations to make.

    Raises:
        ConfigError: ``n`` or ``best_of`` is out of range.
    """
    problems = [
        f"{name} is {value!r}: it must be a whole number, at least 1."
        for name, value in (("n", n), ("best_of", best_of))
        if value is not None and (type(value) is not int or value < 1)
    ]
    if not problems and best_of is not None and best_of < n:
        problems.append(f"best_of is {best_of} and n is {n}: no more can be given than are made.")
    if problems:
        raise ConfigError(problems)
    return n if best_of is None else best_of


def best_samples(generations: Sequence[Generation], n: int) -> list[Generation]:
    """The ``n`` finished generations whose tokens were likeliest on average, best first.

    Args:
        generations: finished, with log-probabilities; of equal ones the earlier is the better.
        n: how many.
    """
    return sorted(generations, key=lambda generation: -mean_logprob(generation))[:n]


def mean_logprob(generation: Generation) -> float:
    """The mean of the log-probabilities of a generation's new tokens; minus infinity of none."""
    known = [found.logprob for found in generation.logprobs if found.logprob is not None]
    return sum(known) / len(known) if known else float("-inf")

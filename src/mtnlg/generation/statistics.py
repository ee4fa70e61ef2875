"""What the engine counts and times while it works."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """How often values fell between bounds; cheap enough for every token.

    Args:
        bounds: upper ends of the buckets, growing; above the last there is one more.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, values up to it) for each bucket, the last bound infinite, as Prometheus has them."""
        total, pairs = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


@dataclass
class EngineStatistics:
    """What the engine is doing and has done.

    Args:
        running: requests that generate now.
        waiting: requests in the queue.
        finished: requests that ended, whatever the reason.
        finish_reasons: of these, how many for which reason.
        preempted: times that a request gave its memory up to an older one, to be computed again later.
        prompt_tokens: prompt tokens taken in.
        cached_tokens: of these, found in the prefix cache.
        new_tokens: tokens generated.
        drafted_tokens: tokens that were guessed (speculative decoding).
        accepted_tokens: of these, the right ones.
        cache_tokens: tokens whose keys and values running requests hold memory for.
        kept_tokens: tokens held for later prompts only; their memory is free for the asking.
        cache_capacity: tokens there is memory for.
        steps: steps done.
        step_seconds: time spent in them.
        model_seconds: of this, in the model's forward pass.
        sampling_seconds: of this, in the choice of tokens.
        first_token_seconds: from submission to the first token, of each request.
        between_tokens_seconds: between two tokens of a request.
        queue_seconds: from submission to the first step, of each request.
        batch_rows: requests that a step worked on.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cache_tokens: int = 0
    kept_tokens: int = 0
    cache_capacity: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    sampling_seconds: float = 0.0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    between_tokens_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS))

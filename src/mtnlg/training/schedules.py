"""Learning-rate schedules over tokens, and the batch-size ramp of Megatron-LM.

A schedule is one method from tokens to a factor of the peak rate. Counting in tokens keeps a schedule
the same when the batch size changes under it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from mtnlg.config import BatchConfig, ConfigError, ScheduleConfig


class Schedule(ABC):
    """Factor of the peak learning rate after linear warmup.

    Args:
        warmup_tokens: tokens over which the factor rises from 0 to 1.
        floor: the factor at the end of the decay.
    """

    def __init__(self, warmup_tokens: float = 0, floor: float = 0.0) -> None:
        self.warmup_tokens = warmup_tokens
        self.floor = floor

    def factor(self, tokens: float, total_tokens: float) -> float:
        """The factor for the step that ends at ``tokens``.

        Args:
            tokens: tokens seen once the step is done.
            total_tokens: tokens at which the decay ends; ``inf`` while that is not known.
        """
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        span = total_tokens - self.warmup_tokens
        if span <= 0:
            return self.floor + (1.0 - self.floor) * self.shape(1.0)
        progress = (tokens - self.warmup_tokens) / span
        return self.floor + (1.0 - self.floor) * self.shape(min(1.0, progress))

    @abstractmethod
    def shape(self, progress: float) -> float:
        """From 1 towards 0 as ``progress``, the share of the decay that is over, goes from 0 to 1."""


class Constant(Schedule):
    """No decay."""

    def shape(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class Linear(Schedule):
    """A straight line to the floor."""

    def shape(self, progress: float) -> float:
        """``1 - progress``."""
        return 1.0 - progress


class Cosine(Schedule):
    """Half a cosine (Loshchilov and Hutter, arXiv 1608.03983), the shape of GPT-3 and MT-NLG."""

    def shape(self, progress: float) -> float:
        """``(1 + cos(pi * progress)) / 2``."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """Constant, then ``1 - sqrt`` over the last share of the run (Hägele et al., arXiv 2405.18392).

    Args:
        warmup_tokens: as in ``Schedule``.
        floor: as in ``Schedule``.
        decay_share: share of what follows the warmup that is spent decaying.
    """

    def __init__(self, warmup_tokens: float = 0, floor: float = 0.0, decay_share: float = 0.2) -> None:
        super().__init__(warmup_tokens, floor)
        self.decay_share = decay_share

    def shape(self, progress: float) -> float:
        """1 until the decay begins, then ``1 - sqrt(share of the decay that is over)``."""
        begin = 1.0 - self.decay_share
        if progress <= begin or self.decay_share == 0.0:
            return 1.0
        return 1.0 - math.sqrt((progress - begin) / self.decay_share)


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that ``config`` names."""
    warmup, floor = config.warmup_tokens, config.min_learning_rate_ratio
    if config.name == "wsd":
        return WarmupStableDecay(warmup, floor, config.wsd_decay_share)
    shapes: dict[str, type[Schedule]] = {"cosine": Cosine, "linear": Linear, "constant": Constant}
    return shapes[config.name](warmup, floor)


class BatchRamp:
    """Global batch size over the samples consumed, by Megatron-LM's rule.

    The size rises from ``ramp_start`` by ``ramp_increment`` at equal distances until it reaches
    ``global_batch_size`` after ``ramp_tokens``. MT-NLG went from 32 to 1,920 sequences in steps of 32
    over its first 12 billion tokens (arXiv 2201.11990, section 3.2).

    Args:
        config: the sizes, in sequences.
        sequence_length: tokens of one sequence.
        num_replicas: data-parallel replicas that share each batch.

    Raises:
        ConfigError: some size of the ramp cannot be divided into micro-batches over the replicas.
    """

    def __init__(self, config: BatchConfig, sequence_length: int, num_replicas: int = 1) -> None:
        self.final = config.global_batch_size
        self.start = config.ramp_start or self.final
        self.increment = config.ramp_increment
        self.samples = config.ramp_tokens // sequence_length
        share = config.micro_batch_size * num_replicas
        ramps = self.start < self.final and self.samples > 0
        problems = [
            f"batch.{name} is {size}: it must be a multiple of micro_batch_size "
            f"({config.micro_batch_size}) times the number of replicas ({num_replicas})."
            for name, size in (("global_batch_size", self.final), ("ramp_start", self.start))
            if size % share
        ]
        if ramps and self.increment % share:
            problems.append(
                f"batch.ramp_increment is {self.increment}: it must be a multiple of micro_batch_size "
                f"({config.micro_batch_size}) times the number of replicas ({num_replicas})."
            )
        if problems:
            raise ConfigError(problems)

    def size(self, consumed_samples: int) -> int:
        """Sequences of the step that begins after ``consumed_samples``."""
        num_increments = (self.final - self.start) // self.increment
        if num_increments == 0 or consumed_samples >= self.samples:
            return self.final
        # Integer arithmetic for floor(consumed / (samples / increments)): no rounding at the edges.
        return self.start + self.increment * (consumed_samples * num_increments // self.samples)

    def samples_after(self, steps: int) -> int:
        """Samples consumed once ``steps`` steps are done."""
        consumed = done = 0
        while done < steps and self.size(consumed) != self.final:
            consumed += self.size(consumed)
            done += 1
        return consumed + (steps - done) * self.final

"""What the searches have in common: their settings, their results, where they end."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from mtnlg.config.errors import ConfigError
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.request import FinishReason, GenerationRequest
from mtnlg.generation.runner import Runner

# Lets nobody else use the runner and the pages while it is open.
Access = Callable[[], AbstractContextManager[tuple[Runner, PageBooks]]]


@dataclass(frozen=True)
class SearchOptions:
    """How to search for a continuation instead of choosing token by token.

    Args:
        num_beams: sequences kept at each step; 1 is no beam search.
        num_beam_groups: groups of beams that keep apart (diverse beam search, arXiv 1610.02424).
        diversity_penalty: taken from the score of a token for each beam of an earlier group that has
            chosen it at the same step.
        length_penalty: a finished sequence's sum of log-probabilities is divided by its number of new
            tokens to this power.
        early_stopping: ``True`` ends when there are ``num_beams`` finished sequences; ``False`` when the
            best running one, at its present length, is no better than the worst of them; ``"never"``
            only when it cannot become better.
        num_return_sequences: how many sequences to give back, best first.
        penalty_alpha: how much likeness to what was said counts against a token, from 0 to 1 (contrastive
            search, arXiv 2202.06417); ``None`` is none.
        top_k: candidates of contrastive search.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    penalty_alpha: float | None = None
    top_k: int = 4

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}: it must be a whole number, at least 1."
            for name in ("num_beams", "num_beam_groups", "num_return_sequences", "top_k")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        for name in ("length_penalty", "diversity_penalty"):
            value = getattr(self, name)
            if not _is_finite(value) or (name == "diversity_penalty" and value < 0):
                least = " and not negative" if name == "diversity_penalty" else ""
                problems.append(f"{name} is {value!r}: it must be a finite number{least}.")
        if self.early_stopping not in (True, False, "never"):
            problems.append(f"early_stopping is {self.early_stopping!r}: choose True, False or 'never'.")
        alpha = self.penalty_alpha
        if alpha is not None and not (_is_finite(alpha) and 0 <= alpha <= 1):
            problems.append(f"penalty_alpha is {alpha!r}: it must be a number from 0 to 1.")
        problems = problems or self._combination_problems()
        if problems:
            raise ConfigError(problems)

    def _combination_problems(self) -> list[str]:
        problems = []
        beams, groups = self.num_beams, self.num_beam_groups
        if beams % groups:
            problems.append(f"num_beams is {beams} and num_beam_groups {groups}: groups must be equal.")
        if self.num_return_sequences > beams:
            problems.append(
                f"num_return_sequences is {self.num_return_sequences} and num_beams {beams}: no more "
                "sequences can be given back than are kept."
            )
        if self.diversity_penalty and groups == 1:
            problems.append(
                f"diversity_penalty is {self.diversity_penalty}: it needs num_beam_groups above 1."
            )
        if self.penalty_alpha is not None and beams > 1:
            problems.append(
                f"penalty_alpha is {self.penalty_alpha} and num_beams {beams}: contrastive search has no "
                "beams; give one of them."
            )
        return problems

    @property
    def is_search(self) -> bool:
        """Whether anything but the usual token by token is asked for."""
        return self.num_beams > 1 or self.penalty_alpha is not None

    @classmethod
    def from_options(cls, **options: Any) -> SearchOptions:
        """The same, where ``None`` is "not given"."""
        return cls(**{name: value for name, value in options.items() if value is not None})


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Found:
    """A continuation that a search has found.

    Args:
        new_ids: its tokens, the end token included.
        score: what it was chosen by: of beam search the sum of its log-probabilities (after the
            penalties) over its length to the power of ``length_penalty``; of contrastive search the
            sum of its steps' scores.
        finish_reason: why it ended.
    """

    new_ids: list[int]
    score: float
    finish_reason: FinishReason


def check_search(request: GenerationRequest) -> None:
    """See that the request asks for nothing that a search cannot do.

    Raises:
        ConfigError: it does.
    """
    problems = []
    if not request.rules.is_greedy:
        problems.append(
            f"temperature is {request.rules.temperature}: a search draws nothing at random; leave "
            "temperature, top_p, min_p, typical_p and seed out."
        )
    for name, value in (("stop", request.stop), ("logprobs", request.logprobs is not None)):
        if value:
            problems.append(f"{name} is set: a search ends at end tokens and gives whole sequences only.")
    if problems:
        raise ConfigError(problems)


def ending_of(token: int, request: GenerationRequest, num_new: int, max_new: int) -> FinishReason | None:
    """Whether a sequence ends with this token, its ``num_new``-th new one."""
    if token in request.end_ids:
        return "end"
    return "length" if num_new >= max_new else None

"""How tokens are drawn: every rule by the name the field gives it, checked when it is given.

The formulas, their sources and the order in which they apply are in ``docs/sampling.md``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mtnlg.config.errors import ConfigError

COLDEST = 1e-30  # a colder temperature is this one: its inverse must be a float32
HOTTEST = 1e30  # a hotter one likewise: minus infinity divided by it must stay so
LogitBias = Mapping[int, float] | Sequence[tuple[int, float]]


@dataclass(frozen=True)
class SamplingRules:
    """How one token is chosen from the logits.

    They apply in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty`` and
    ``presence_penalty``, ``no_repeat_ngram_size``, then (from the request) the least number of new
    tokens and the constraint, then ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``.
    Where transformers has the rule it has it in this place.

    Args:
        temperature: divides the logits; 0 is greedy (always the most likely token).
        top_k: keep only the ``top_k`` most likely tokens (those tied with the last one too);
            0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach ``top_p`` (those
            tied with the last one too; arXiv 1904.09751); 1 keeps all.
        seed: of the random draws; ``None`` draws a fresh one.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest (arXiv 2407.01082);
            0 keeps all.
        typical_p: keep the smallest set of tokens whose information is nearest to the entropy and
            whose probabilities reach ``typical_p`` (arXiv 2202.00666); 1 keeps all.
        repetition_penalty: divides positive logits and multiplies negative ones of every token that the
            prompt or the continuation holds (arXiv 1909.05858); 1 is none.
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        presence_penalty: subtracted once from the logit of every token that was generated.
        no_repeat_ngram_size: no sequence of so many tokens comes twice, the prompt included; 0 is off.
        logit_bias: (token, number added to its logit); ``-inf`` rules the token out.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}: it must be {wanted}."
            for name, is_valid, wanted in _CHECKS
            if not is_valid(getattr(self, name))
        ]
        problems += _bias_problems(self.logit_bias)
        if problems:
            raise ConfigError(problems)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether a rule looks at which tokens there were and how often."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)

    @property
    def truncates(self) -> bool:
        """Whether a rule leaves tokens out of the draw by how likely they are."""
        return bool(self.top_k or self.top_p < 1.0 or self.min_p or self.typical_p < 1.0)

    @cached_property
    def of_chance(self) -> tuple[float, ...]:
        """Temperature, top-k, top-p, log min-p and typical as they are computed with; 0 is greedy."""
        temperature = min(max(self.temperature, COLDEST), HOTTEST) if self.temperature else 0.0
        floor = float(np.log(np.float32(self.min_p))) if self.min_p else -math.inf
        top_p, typical_p = float(np.float32(self.top_p)), float(np.float32(self.typical_p))
        return temperature, float(self.top_k), top_p, floor, typical_p

    @classmethod
    def from_options(
        cls,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        *,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        logit_bias: LogitBias | None = None,
    ) -> SamplingRules:
        """Rules from what a user gave; ``None`` is "not given".

        Without ``temperature`` the most likely token is always taken, unless an option was given that
        only makes sense for random draws (``top_k``, ``top_p``, ``min_p``, ``typical_p``, ``seed``):
        then it is 1.
        """
        if temperature is None:
            draws = (top_k, top_p, min_p, typical_p, seed)
            temperature = 0.0 if all(option is None for option in draws) else 1.0
        given: dict[str, Any] = {
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return cls(temperature=temperature, seed=seed, logit_bias=_as_pairs(logit_bias), **given)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_SHARE = ("a number above 0 and at most 1 (1 keeps every token)", lambda v: _is_number(v) and 0 < v <= 1)
_OPENAI = ("a number from -2 to 2", lambda v: _is_number(v) and -2 <= v <= 2)
_CHECKS: tuple[tuple[str, Any, str], ...] = (
    ("temperature", lambda v: _is_number(v) and v >= 0, "a finite number and not negative (0 is greedy)"),
    ("top_k", _is_count, "a whole number and not negative (0 keeps every token)"),
    ("top_p", _SHARE[1], _SHARE[0]),
    ("seed", lambda v: v is None or _is_count(v), "a whole number and not negative"),
    ("min_p", lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 (keeps every token) to 1"),
    ("typical_p", _SHARE[1], _SHARE[0]),
    ("repetition_penalty", lambda v: _is_number(v) and v > 0, "a finite number above 0 (1 is none)"),
    ("frequency_penalty", _OPENAI[1], _OPENAI[0]),
    ("presence_penalty", _OPENAI[1], _OPENAI[0]),
    ("no_repeat_ngram_size", _is_count, "a whole number and not negative (0 is off)"),
)


def _as_pairs(logit_bias: LogitBias | None) -> tuple[tuple[int, float], ...]:
    if logit_bias is None:
        return ()
    pairs = logit_bias.items() if isinstance(logit_bias, Mapping) else logit_bias
    return tuple((token, bias) for token, bias in pairs)


def _bias_problems(logit_bias: Sequence[tuple[int, float]]) -> list[str]:
    problems = []
    seen: set[int] = set()
    for token, bias in logit_bias:
        if not _is_count(token):
            problems.append(f"logit_bias names token {token!r}: it must be a whole number, not negative.")
        elif not ((_is_number(bias) and abs(bias) <= 1e6) or bias == -math.inf):
            problems.append(
                f"logit_bias of token {token} is {bias!r}: it must be a number from -1e6 to 1e6, or -inf "
                "to rule the token out."
            )
        elif token in seen:
            problems.append(f"logit_bias names token {token} twice: give it one number.")
        seen.add(token)
    return problems


def stream_of(seed: int | None, number: int = 0) -> torch.Generator:
    """One of a seed's CPU random streams, decided by ``(seed, number)`` alone.

    Args:
        seed: any integer that is not negative; ``None`` draws a fresh one.
        number: which stream, so that the rows or samples of one seed differ.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}: it must not be negative.")
    entropy = secrets.randbits(64) if seed is None else seed
    state = np.random.SeedSequence([entropy, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

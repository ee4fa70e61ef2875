"""From logits to the next token of each running sequence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtnlg.generation import draws
from mtnlg.generation.constraint import ConstraintState
from mtnlg.generation.distribution import (
    NOT_FINITE,
    inverse_transform,
    row_probabilities,
    uniforms,
)
from mtnlg.generation.history import NgramHistory, TokenCounts
from mtnlg.generation.penalties import edit_scores
from mtnlg.generation.request import GenerationRequest, TokenLogprobs
from mtnlg.generation.sampling import SamplingRules, stream_of

NOTHING_LEFT = (
    "the request's rules leave no token to go on with: its constraint, logit_bias, "
    "no_repeat_ngram_size and min_new_tokens rule all of them out here; loosen one."
)
NUMBERS_AT_ONCE = 32
GREEDY = SamplingRules()


@dataclass
class SamplingState:
    """What the choice of a sequence's next token depends on, besides the logits.

    Args:
        rules: how tokens are drawn.
        prompt_ids: the prompt.
        generator: the sequence's own stream of random numbers.
        end_ids: tokens that would end it.
        min_new_tokens: before so many new tokens ``end_ids`` are ruled out.
        constraint: how far it has come in its rule.
        num_logprobs: see ``GenerationRequest.logprobs``.
        new_ids: tokens chosen so far.
    """

    rules: SamplingRules
    prompt_ids: Sequence[int]
    generator: torch.Generator
    end_ids: Collection[int] = ()
    min_new_tokens: int = 0
    constraint: ConstraintState | None = None
    num_logprobs: int | None = None
    new_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rules = self.rules
        self.bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
        self.counts: TokenCounts | None = None
        self.ngrams: NgramHistory | None = None
        self._numbers: list[float] = []
        if rules.logit_bias:
            ids, values = zip(*rules.logit_bias)
            self.bias = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
        if rules.counts_tokens:
            # Only the repetition penalty looks at the prompt.
            self.counts = TokenCounts(self.prompt_ids if rules.repetition_penalty != 1.0 else ())
            for token in self.new_ids:
                self.counts.accept(token)
        if rules.no_repeat_ngram_size:
            self.ngrams = NgramHistory(rules.no_repeat_ngram_size, [*self.prompt_ids, *self.new_ids])

    @classmethod
    def of_request(cls, request: GenerationRequest) -> SamplingState:
        """The state before the first new token."""
        return cls(
            request.rules,
            request.prompt_ids,
            stream_of(request.rules.seed, request.stream),
            request.end_ids,
            request.min_new_tokens,
            None if request.constraint is None else request.constraint.start(),
            request.logprobs,
        )

    def accept(self, token: int) -> None:
        """Go on by a token."""
        self.new_ids.append(token)
        if self.counts is not None:
            self.counts.accept(token)
        if self.ngrams is not None:
            self.ngrams.accept(token)
        if self.constraint is not None:
            self.constraint.accept(token)

    def uniform(self) -> float:
        """The next number of the sequence's own stream, at least 0 and below 1."""
        if not self._numbers:
            self._numbers = uniforms(self.generator, NUMBERS_AT_ONCE)[::-1]
        return self._numbers.pop()

    def fork(self) -> SamplingState:
        """The same state, to go on from in another way: only the random stream is shared."""
        other = SamplingState.__new__(SamplingState)
        other.__dict__.update(self.__dict__)
        other.new_ids = list(self.new_ids)
        other.counts = None if self.counts is None else self.counts.copy()
        other.ngrams = None if self.ngrams is None else self.ngrams.copy()
        other.constraint = None if self.constraint is None else self.constraint.copy()
        return other


@dataclass(frozen=True)
class Sampled:
    """One chosen token.

    Args:
        token: the token, -1 where there is none.
        logprobs: where they were asked for.
        error: why no token could be chosen; it concerns this sequence alone.
    """

    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose the next token of each sequence; of the states only the random streams go on.

    A row's token depends on its own logits, rules and stream alone, not on the other rows.

    Args:
        logits: float32 [rows, vocab]; may be overwritten.
        states: one for each row.
    """
    if not states:
        return []
    logits = logits.float().contiguous()
    asking = [row for row, state in enumerate(states) if state.num_logprobs is not None]
    is_changing = any(_is_changing(state) for state in states)
    before = logits
    if asking and is_changing:
        before = logits.clone() if len(asking) == len(states) else logits[asking]
    errors: dict[int, str] = {}
    if is_changing:
        errors = {row: NOT_FINITE for row, best in enumerate(_largest(logits)) if not math.isfinite(best)}
        edit_scores(logits, states)
    largest, choice = _choose(logits, states)
    for row, best in enumerate(largest):
        if not math.isfinite(best):
            errors.setdefault(row, NOTHING_LEFT if is_changing else NOT_FINITE)
    logprobs: dict[int, TokenLogprobs] = {}
    if asking:
        asked = before if len(before) == len(asking) else before[asking]
        found = many_logprobs(
            asked, [choice[row] for row in asking], [states[row].num_logprobs or 0 for row in asking]
        )
        logprobs = dict(zip(asking, found))
    return [
        Sampled(-1, error=errors[row]) if row in errors else Sampled(token, logprobs.get(row))
        for row, token in enumerate(choice)
    ]


@torch.inference_mode()
def distributions(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """What :func:`sample` draws from: probabilities float32 [rows, vocab], after all rules.

    Args:
        logits: float32 [rows, vocab], finite; may be overwritten.
        states: one for each row; greedy ones have all their probability on one token. Not changed.
    """
    logits = logits.float().contiguous()
    edit_scores(logits, states)
    rules = [state.rules for state in states]
    if logits.device.type == "cpu":
        return draws.probabilities(logits, rules)
    return row_probabilities(logits, rules)


def _is_changing(state: SamplingState) -> bool:
    """Whether the state has rules that change single logits."""
    return (
        state.bias is not None
        or state.counts is not None
        or state.ngrams is not None
        or state.constraint is not None
        or len(state.new_ids) < state.min_new_tokens
    )


def _largest(logits: Tensor) -> list[float]:
    """The largest of each row, NaN where there is one."""
    if logits.device.type == "cpu":
        return draws.choose(logits, [GREEDY] * len(logits), [0.0] * len(logits))[0]
    found: list[float] = logits.amax(dim=-1).tolist()
    return found


def _choose(logits: Tensor, states: Sequence[SamplingState]) -> tuple[list[float], list[int]]:
    """The largest of each row (NaN where there is one), and the row's token."""
    rules = [state.rules for state in states]
    shares = [0.0 if state.rules.is_greedy else state.uniform() for state in states]
    if logits.device.type == "cpu":
        return draws.choose(logits, rules, shares)
    largest = logits.max(dim=-1)
    best, tokens = largest.values.tolist(), largest.indices.tolist()
    drawing = [row for row, rule in enumerate(rules) if not rule.is_greedy and math.isfinite(best[row])]
    if drawing:
        probabilities = row_probabilities(logits[drawing], [rules[row] for row in drawing])
        numbers = torch.tensor([shares[row] for row in drawing], dtype=torch.float64)
        for row, token in zip(drawing, inverse_transform(probabilities, numbers).tolist()):
            tokens[row] = token
    return best, tokens


def many_logprobs(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """How likely these tokens are, and which are the most likely, by the model alone.

    Args:
        logits: [rows, vocab], as the model gave them.
        tokens: one for each row.
        num_top: how many of the most likely ones for each row.
    """
    most = min(max(num_top, default=0), logits.shape[-1])
    logits = logits.float().contiguous()
    totals, values, ids = draws.likeliest(logits, most)
    places = torch.tensor(tokens, device=logits.device)[:, None]
    own = logits.gather(1, places).squeeze(1).tolist()
    return [
        TokenLogprobs(
            own[row] - total,
            tuple((token, value - total) for token, value in zip(ids[row][:wanted], values[row])),
        )
        for row, (total, wanted) in enumerate(zip(totals, num_top))
    ]


def token_logprobs(logits: Tensor, token: int, num_top: int | None) -> TokenLogprobs | None:
    """What ``GenerationRequest.logprobs`` asks for, from the logits [vocab] of one place."""
    return None if num_top is None else many_logprobs(logits[None], [token], [num_top])[0]

"""From logits to the next token of each running sequence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtnlg.generation.constraint import ConstraintState
from mtnlg.generation.request import GenerationRequest, TokenLogprobs
from mtnlg.generation.sampling import SamplingRules, choose_tokens, row_generators


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

    @classmethod
    def of_request(cls, request: GenerationRequest) -> SamplingState:
        """The state before the first new token."""
        return cls(
            request.rules,
            request.prompt_ids,
            row_generators(request.rules.seed, request.stream + 1)[-1],
            request.end_ids,
            request.min_new_tokens,
            None if request.constraint is None else request.constraint.start(),
            request.logprobs,
        )

    def accept(self, token: int) -> None:
        """Go on by a token."""
        self.new_ids.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)


@dataclass(frozen=True)
class Sampled:
    """One chosen token."""

    token: int
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose the next token of each sequence; the states are not changed.

    Args:
        logits: float32 [rows, vocab]; may be overwritten.
        states: one for each row.
    """
    chosen = []
    for row, state in zip(logits, states, strict=True):
        token = int(choose_tokens(row[None], state.rules, [state.generator])[0])
        chosen.append(Sampled(token, token_logprobs(row, token, state.num_logprobs)))
    return chosen


def token_logprobs(logits: Tensor, token: int, num_top: int | None) -> TokenLogprobs | None:
    """What ``GenerationRequest.logprobs`` asks for, from the logits [vocab] of one place."""
    if num_top is None:
        return None
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist()))
    return TokenLogprobs(float(logprobs[token]), top)

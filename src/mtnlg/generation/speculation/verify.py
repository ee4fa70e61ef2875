"""Checking guesses so that what comes out is distributed as if nobody had guessed.

A token x that was drawn from q is kept with probability min(1, p(x) / q(x)), where p is what the model
draws from; otherwise another is drawn from max(0, p - q), normalised. What results has the distribution
p exactly (Leviathan et al., arXiv 2211.17192, appendix A.1). A guess that left nothing to chance has
q(x) = 1: then drawing from p and seeing whether x comes is the same thing, and uses the same random
number as without speculation, so that even the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtnlg.generation.distribution import inverse_transform
from mtnlg.generation.request import TokenLogprobs
from mtnlg.generation.sampler import Sampled, SamplingState, distributions, many_logprobs, sample

Guess = tuple[int, Tensor]  # the token, and what it was drawn from: float32 [vocab]


@torch.inference_mode()
def sample_drafted(
    logits: Tensor, states: Sequence[SamplingState], guesses: Sequence[Guess | None]
) -> list[Sampled]:
    """Choose the next token of each sequence, the guessed one wherever that is right.

    Args:
        logits: float32 [rows, vocab]; may be overwritten.
        states: one for each row; only their random streams go on.
        guesses: for each row, a guess that was drawn at random; ``None`` where there is none, or where
            the rules are greedy.

    Returns:
        What ``sample`` returns.
    """
    drafted = [row for row, guess in enumerate(guesses) if guess is not None]
    if not drafted:
        return sample(logits, states)
    found: dict[int, Sampled] = {}
    before = logits[drafted]
    wanted = distributions(before.clone(), [states[row] for row in drafted])
    for place, row in enumerate(drafted):
        guess = guesses[row]
        assert guess is not None
        if bool(wanted[place].isfinite().all()):  # else sample says what is wrong
            token = _keep_or_replace(wanted[place], guess, states[row])
            found[row] = Sampled(token, _logprobs(before[place], token, states[row]))
    rest = [row for row in range(len(states)) if row not in found]
    if rest:
        chosen = sample(logits[rest], [states[row] for row in rest])
        found |= dict(zip(rest, chosen))
    return [found[row] for row in range(len(states))]


def _keep_or_replace(wanted: Tensor, guess: Guess, state: SamplingState) -> int:
    token, drawn_from = guess
    drawn_from = drawn_from.to(wanted.device)
    if state.uniform() * float(drawn_from[token]) < float(wanted[token]):
        return token
    rest = (wanted.double() - drawn_from.double()).clamp(min=0.0)
    if float(rest.sum()) <= 0.0:  # p and q are the same but for rounding
        rest = wanted.double()
    number = torch.tensor([state.uniform()], dtype=torch.float64)
    return int(inverse_transform(rest[None], number)[0])


def _logprobs(logits: Tensor, token: int, state: SamplingState) -> TokenLogprobs | None:
    if state.num_logprobs is None:
        return None
    return many_logprobs(logits[None], [token], [state.num_logprobs])[0]

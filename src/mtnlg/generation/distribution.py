"""What is left of a distribution after temperature, top-k, top-p, min-p and typical.

The rules as they are defined, for any number of rows that each have their own, in a fixed number of
tensor operations and without a look at the host. This is what accelerators run, and what the faster
ways of ``draws.py`` are tested against: the same random number gives the same token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.sampling import SamplingRules

NOT_FINITE = (
    "the model's logits are not finite numbers: its weights are damaged, or its precision "
    "overflowed (try dtype float32)."
)


def row_probabilities(logits: Tensor, rules: Sequence[SamplingRules]) -> Tensor:
    """The distribution that each row's rules draw from.

    Args:
        logits: [rows, vocab], no NaN, a finite maximum in each row.
        rules: one for each row; of them the temperature and what comes after it. Greedy rows have all
            their probability on the most likely token.

    Returns:
        Probabilities [rows, vocab] in float32; tokens ruled out have exactly 0.
    """
    scores = tempered(logits.float(), rules)
    if any(rule.truncates and not rule.is_greedy for rule in rules):
        scores = _truncated(scores, rules)
    probabilities = scores.softmax(dim=-1)
    greedy = [row for row, rule in enumerate(rules) if rule.is_greedy]
    if greedy:
        best = logits[greedy].argmax(dim=-1, keepdim=True)
        probabilities[greedy] = torch.zeros_like(probabilities[greedy]).scatter_(-1, best, 1.0)
    return probabilities


def tempered(logits: Tensor, rules: Sequence[SamplingRules]) -> Tensor:
    """(logits - their maximum) / temperature; greedy rows are not divided."""
    temperatures = _column(logits, [rule.of_chance[0] or 1.0 for rule in rules])
    # Subtracting the maximum first keeps tiny temperatures from overflowing to infinity.
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperatures


def _truncated(scores: Tensor, rules: Sequence[SamplingRules]) -> Tensor:
    """The scores with ``-inf`` where a rule leaves a token out."""
    ordered = scores.sort(dim=-1, descending=True).values
    smallest = ordered[:, -1:]  # [rows, 1] the smallest score that is kept so far
    vocab = scores.shape[-1]
    if any(rule.top_k for rule in rules):
        places = [min(rule.top_k or vocab, vocab) - 1 for rule in rules]
        smallest = ordered.gather(-1, torch.tensor(places, device=scores.device)[:, None])
    if any(rule.top_p < 1.0 for rule in rules):
        mass = _column(scores, [rule.top_p for rule in rules])
        weights = ordered.masked_fill(ordered < smallest, float("-inf")).softmax(dim=-1).double()
        before = weights.cumsum(dim=-1) - weights  # probability of everything likelier
        # Of what the weights really add up to: rounded, that is not quite 1.
        num_kept = (before < mass * weights.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
        num_kept = torch.where(mass < 1.0, num_kept, vocab)
        smallest = smallest.maximum(ordered.gather(-1, num_kept - 1))
    if any(rule.min_p for rule in rules):  # scores are logarithms, and the best one's is 0
        smallest = smallest.maximum(_column(scores, [rule.min_p for rule in rules]).log())
    scores = scores.masked_fill(scores < smallest, float("-inf"))
    if any(rule.typical_p < 1.0 for rule in rules):
        scores = _typical(scores, _column(scores, [rule.typical_p for rule in rules]))
    return scores


def _typical(scores: Tensor, mass: Tensor) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, until they reach ``mass``."""
    logprobs = scores.log_softmax(dim=-1)
    weights = logprobs.exp()
    entropy = -(weights * logprobs).nansum(dim=-1, keepdim=True)  # 0 · log 0 counts as 0
    distance = (logprobs + entropy).abs()
    ordered, order = distance.sort(dim=-1)
    sorted_weights = weights.gather(-1, order).double()
    before = sorted_weights.cumsum(dim=-1) - sorted_weights
    num_kept = (before < mass * sorted_weights.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    furthest = ordered.gather(-1, num_kept - 1)
    return scores.masked_fill((distance > furthest) & (mass < 1.0), float("-inf"))


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """[rows, 1]"""
    return torch.tensor(values, dtype=torch.float32).to(like.device, non_blocking=True)[:, None]


def token_probabilities(logits: Tensor, rules: SamplingRules) -> Tensor:
    """:func:`row_probabilities` with the same rules for every row of [batch, vocab]."""
    return row_probabilities(logits, [rules] * len(logits))


def inverse_transform(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token of each row.

    Args:
        probabilities: [rows, vocab], or anything proportional to them.
        uniforms: float64 [rows], at least 0 and at most 1 - 2**-32.

    Returns:
        LongTensor [rows]; never one of probability 0.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    thresholds = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)


def choose_tokens(logits: Tensor, rules: SamplingRules, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row by temperature, top-k, top-p, min-p and typical alone.

    Args:
        logits: [batch, vocab].
        rules: how to draw.
        generators: one CPU stream for each row; each gives one number (none when greedy).

    Returns:
        LongTensor [batch].

    Raises:
        MtnlgError: the logits are not finite, so the weights are damaged or overflowed.
    """
    best, choice = logits.max(dim=-1)
    if not bool(best.isfinite().all()):
        raise MtnlgError(NOT_FINITE)
    if rules.is_greedy:
        return choice
    uniforms = torch.tensor([uniform(generator) for generator in generators], dtype=torch.float64)
    return inverse_transform(token_probabilities(logits, rules), uniforms)


def uniform(generator: torch.Generator) -> float:
    """A random number of at least 0 and at most 1 - 2**-32: times a sum, it stays below the sum."""
    return uniforms(generator, 1)[0]


def uniforms(generator: torch.Generator, count: int) -> list[float]:
    """So many of them at once."""
    drawn: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return [number * (1.0 - 2.0**-32) for number in drawn]

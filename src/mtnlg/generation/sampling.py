"""Which token comes next: greedy, temperature, top-k and top-p (nucleus, arXiv 1904.09751).

The rules know nothing of models, caches or batches of requests. Each row draws its own uniform
number, so what a sequence becomes does not depend on its neighbours in the batch or on the device.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtnlg.config.errors import ConfigError, MtnlgError


@dataclass(frozen=True)
class SamplingRules:
    """How one token is drawn from the logits.

    They apply in this order: temperature, then top-k, then top-p.

    Args:
        temperature: divides the logits; 0 is greedy (always the most likely token).
        top_k: keep only the ``top_k`` most likely tokens (those tied with the last one too);
            0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach ``top_p``;
            1 keeps all.
        seed: of the random draws; ``None`` draws a fresh one.

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
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}: it must be finite and not negative.")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}: it must not be negative (0 keeps every token).")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}: it must be above 0 and at most 1.")
        if problems:
            raise ConfigError(problems)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_options(
        cls,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> SamplingRules:
        """Rules from what a user gave: greedy if nothing was, else temperature 1 unless given."""
        if temperature is None:
            nothing_given = top_k is None and top_p is None and seed is None
            temperature = 0.0 if nothing_given else 1.0
        return cls(temperature, top_k or 0, 1.0 if top_p is None else top_p, seed)


def row_generators(seed: int | None, num_rows: int) -> list[torch.Generator]:
    """One CPU random stream for each row, decided by ``(seed, row)`` alone.

    Args:
        seed: any integer that is not negative; ``None`` draws a fresh one.
        num_rows: number of sequences.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed is not None and seed < 0:
        raise ConfigError(f"seed is {seed}: it must not be negative.")
    entropy = secrets.randbits(64) if seed is None else seed
    generators = []
    for row in range(num_rows):
        state = np.random.SeedSequence([entropy, row]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(state >> np.uint64(1))))
    return generators


def token_probabilities(logits: Tensor, rules: SamplingRules) -> Tensor:
    """The distribution that ``rules`` draw from.

    Args:
        logits: [batch, vocab].
        rules: temperature above 0.

    Returns:
        Probabilities [batch, vocab] in float32; tokens ruled out have exactly 0.
    """
    logits = logits.float()
    # Subtracting the maximum first keeps tiny temperatures from overflowing to infinity.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / rules.temperature
    if 0 < rules.top_k < scaled.size(-1):
        smallest_kept = scaled.topk(rules.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, float("-inf"))
    probabilities = scaled.softmax(dim=-1)
    if rules.top_p < 1.0:
        probabilities = _nucleus(probabilities, rules.top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose probabilities reach ``top_p``; renormalise."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of everything likelier
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def choose_tokens(logits: Tensor, rules: SamplingRules, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row.

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
        raise MtnlgError(
            "the model's logits are not finite numbers: its weights are damaged, or its precision "
            "overflowed (try dtype float32)."
        )
    if rules.is_greedy:
        return choice
    cumulative = token_probabilities(logits, rules).double().cumsum(dim=-1)
    # Inverse transform sampling. A float32 uniform is at most 1 - 2^-24, so the product stays below
    # the total and a token of probability 0 is never reached.
    uniforms = torch.stack([torch.rand((), generator=generator) for generator in generators])
    thresholds = uniforms.double().to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)

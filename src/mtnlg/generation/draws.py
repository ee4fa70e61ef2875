"""Drawing tokens on a CPU without sorting the vocabulary.

``distribution.py`` says what is drawn; here is how it is done where a sort of 50,257 numbers takes
longer than everything else. Two ways, by what a row's rules allow:

- With top-k, all that can be drawn is among a few hundred candidates, which the largest of each block
  of the vocabulary lead to.
- Otherwise a token is drawn from the whole vocabulary and refused where the rules leave it out; the
  next draw is then from what they may still keep. Whether a token is left out takes one sum (of all
  that is likelier), not a sort. What is accepted has the distribution that the rules define: each draw
  is from a superset of the tokens kept, and within these a refusal changes no proportion.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.distribution import COLDEST, inverse_transform, row_probabilities
from mtnlg.generation.sampling import SamplingRules

if TYPE_CHECKING:
    from mtnlg.generation.sampler import SamplingState

MOST_CANDIDATES = 256  # a larger top-k goes the other way
SPARE_CANDIDATES = 32  # room for tokens that are tied with the last one kept
BLOCK_WIDTHS = (64, 8)
SUM_WIDTH = 256
LARGEST = 1e30  # stands for infinity where 0 times it must be 0
HOTTEST_SCALED = 1e30  # what logits / temperature may be without taking the maximum off first


def draw_tokens(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Draw a token for each row, by temperature, top-k, top-p, min-p and typical.

    Args:
        logits: float32 [rows, vocab] on the CPU, a finite maximum in each row; may be overwritten.
        states: one for each row, not greedy; each gives at least one random number.
    """
    tokens = [-1] * len(states)

    def fill(rows: list[int], draw: Callable[[Tensor, list[SamplingState]], list[int]]) -> None:
        if rows:
            chosen = logits if len(rows) == len(states) else logits[rows]
            for row, token in zip(rows, draw(chosen, [states[row] for row in rows])):
                tokens[row] = token

    for rows in _rows_by_top_k(logits, states):
        fill(rows, _draw_from_candidates)
    fill([row for row, token in enumerate(tokens) if token < 0], _draw_from_all)
    return tokens


def _rows_by_top_k(logits: Tensor, states: Sequence[SamplingState]) -> list[list[int]]:
    """Rows with the same top-k, where it is small.

    Only the same one: more candidates than a row has alone would make sums of another length, which are
    rounded differently.
    """
    most = min(MOST_CANDIDATES, logits.shape[-1] // BLOCK_WIDTHS[0] - SPARE_CANDIDATES)
    groups: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if 0 < state.rules.top_k <= most:
            groups.setdefault(state.rules.top_k, []).append(row)
    return list(groups.values())


# -- with top-k


def _draw_from_candidates(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """A token of each row, or -1 where more are tied for the last place than there is room for.

    Args:
        logits: float32 [rows, vocab].
        states: one for each row, all with the same top-k.
    """
    rules = [state.rules for state in states]
    top_k = rules[0].top_k
    values, ids = most_likely(logits, top_k + SPARE_CANDIDATES)
    is_complete = (values[:, top_k - 1] > values[:, -1]).tolist()
    numbers = [state.uniform() if whole else 0.0 for state, whole in zip(states, is_complete)]
    probabilities = row_probabilities(values, rules)
    places = inverse_transform(probabilities, torch.tensor(numbers, dtype=torch.float64))
    tokens = ids.gather(1, places[:, None]).squeeze(1).tolist()
    return [token if whole else -1 for token, whole in zip(tokens, is_complete)]


def most_likely(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores of each row and their places, largest first.

    Each pass takes the ``count`` blocks with the largest maxima: no other can hold a score that is
    among the ``count`` largest, up to ties.

    Args:
        scores: [rows, length], at least ``count`` long.
        count: how many.
    """
    ids: Tensor | None = None
    for width in BLOCK_WIDTHS:
        num_blocks = scores.shape[1] // width
        if num_blocks <= count:
            continue
        whole = num_blocks * width
        blocks = scores[:, :whole].unflatten(1, (num_blocks, width))
        best = blocks.amax(dim=-1).topk(count, sorted=False).indices
        row = torch.arange(len(scores), device=scores.device)[:, None]
        places = (best[:, :, None] * width + torch.arange(width, device=scores.device)).flatten(1)
        rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(len(scores), -1)
        places = torch.cat([places, rest], dim=1)
        scores = torch.cat([blocks[row, best].flatten(1), scores[:, whole:]], dim=1)
        ids = places if ids is None else ids.gather(1, places)
    top = scores.topk(count)
    return top.values, top.indices if ids is None else ids.gather(1, top.indices)


# -- without


def _draw_from_all(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    scale(logits, [state.rules.temperature for state in states])
    probabilities = logits.softmax(dim=-1)
    tokens = draw_by_blocks(probabilities, [state.uniform() for state in states])
    for row, state in enumerate(states):
        if state.rules.truncates:
            tokens[row] = _draw_until_kept(probabilities[row], logits[row], tokens[row], state)
    return tokens


def scale(logits: Tensor, temperatures: Sequence[float]) -> None:
    """Divide each row by its temperature, in place; up to a constant where that would overflow."""
    if all(temperature == 1.0 for temperature in temperatures):
        return
    inverse = [1.0 / max(temperature, COLDEST) for temperature in temperatures]
    highest = logits.amax(dim=-1).tolist()
    for row, (best, factor) in enumerate(zip(highest, inverse)):
        if abs(best * factor) > HOTTEST_SCALED:
            logits[row] -= best
    is_same = len(set(inverse)) == 1
    logits.mul_(inverse[0] if is_same else torch.tensor(inverse, dtype=torch.float32)[:, None])


def draw_by_blocks(weights: Tensor, numbers: Sequence[float]) -> list[int]:
    """Inverse transform sampling in two steps: first the block, then the token in it.

    Args:
        weights: float32 [rows, vocab] on the CPU, none negative, some positive in each row.
        numbers: a random number of [0, 1) for each row.
    """
    vocab = weights.shape[1]
    num_blocks = vocab // SUM_WIDTH
    whole = num_blocks * SUM_WIDTH
    sums = np.zeros((len(weights), num_blocks + 1))
    if num_blocks:
        blocks = weights[:, :whole].unflatten(1, (num_blocks, SUM_WIDTH))
        sums[:, :-1] = blocks.sum(dim=-1).numpy()
    rows = weights.numpy()
    sums[:, -1] = rows[:, whole:].sum(axis=-1)
    tokens = []
    for row, number, cumulative in zip(rows, numbers, sums.cumsum(axis=-1)):
        threshold = number * cumulative[-1]
        block = int(cumulative.searchsorted(threshold, side="right"))
        before = cumulative[block - 1] if block else 0.0
        inside = row[block * SUM_WIDTH : (block + 1) * SUM_WIDTH].cumsum(dtype=np.float64)
        # The block's sum was rounded: what is left may not reach the end of the exact one.
        left = min(threshold - before, inside[-1] * (1.0 - 2.0**-32))
        tokens.append(block * SUM_WIDTH + int(inside.searchsorted(left, side="right")))
    return tokens


def _draw_until_kept(weights: Tensor, scaled: Tensor, token: int, state: SamplingState) -> int:
    """The token, or others drawn after it until the rules keep one.

    Args:
        weights: [vocab] probabilities before truncation.
        scaled: [vocab] logits that they are the softmax of.
        token: the first draw from them.
        state: the rules, and more random numbers.
    """
    rules = state.rules
    floor, mass = _floor(weights, rules)
    if rules.typical_p < 1.0:
        if rules.top_p < 1.0:
            floor = max(floor, _nucleus_floor(weights, mass))
        return _draw_typical(at_least(weights, floor), scaled, token, state)
    while True:
        weight = float(weights[token])
        if weight < floor:
            pool = at_least(weights, floor)
        elif rules.top_p == 1.0:
            return token
        else:
            pool = F.threshold(weights, weight, 0.0)  # what is likelier than the token
            if float(pool.sum()) < mass:
                return token
        token = draw_by_blocks(pool[None], [state.uniform()])[0]


def at_least(weights: Tensor, floor: float) -> Tensor:
    """The weights that are not below ``floor``, the others 0."""
    below = float(np.nextafter(np.float32(floor), np.float32(-1.0)))  # threshold() keeps what is above
    return F.threshold(weights, below, 0.0) if floor > 0 else weights


def _floor(weights: Tensor, rules: SamplingRules) -> tuple[float, float]:
    """The smallest weight that top-k and min-p keep, and the mass of which top-p keeps its share."""
    floor, total = 0.0, 1.0
    if 0 < rules.top_k < len(weights):
        floor = float(most_likely(weights[None], rules.top_k)[0][0, -1])
        total = float(at_least(weights, floor).sum())
    if rules.min_p:
        floor = max(floor, float(np.float32(rules.min_p * float(weights.amax()))))
    return floor, rules.top_p * total


def _nucleus_floor(weights: Tensor, mass: float) -> float:
    """The smallest weight whose likelier ones are less than ``mass``, found by halving.

    Positive floats are in the order of their bits, so thirty-one halvings find the exact one.
    """
    low, high = 0, int(weights.amax().view(torch.int32))
    while low < high:
        middle = (low + high) // 2
        if float(F.threshold(weights, _float_of(middle), 0.0).sum()) < mass:
            high = middle
        else:
            low = middle + 1
    return _float_of(low)


def _float_of(bits: int) -> float:
    """The float32 that these bits are."""
    return float(struct.unpack("f", struct.pack("i", bits))[0])


def _draw_typical(weights: Tensor, scaled: Tensor, token: int, state: SamplingState) -> int:
    """As :func:`_draw_until_kept`, where the tokens kept are those nearest to the entropy."""
    total = float(weights.sum())
    likeliest = int(weights.argmax())
    constant = float(scaled[likeliest]) - math.log(float(weights[likeliest]) / total)
    logprobs = (scaled - constant).masked_fill_(weights == 0.0, -LARGEST)
    entropy = -float(weights.dot(logprobs)) / total
    distance = logprobs.add_(entropy).abs_()
    mass = state.rules.typical_p * total
    pool = weights
    while True:
        if float(pool[token]) > 0.0:
            pool = weights * (distance < distance[token])
            if float(pool.sum()) < mass:
                return token
        token = draw_by_blocks(pool[None], [state.uniform()])[0]

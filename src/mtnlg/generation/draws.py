"""Drawing tokens on a CPU without sorting the vocabulary.

``distribution.py`` says what is drawn; here is how it is done where a sort of 50,257 numbers takes
longer than everything else. What top-k, top-p, min-p and typical keep is what is not below some score.
That score is found by halving the range of scores and throwing away, after one sum, the half in which
it cannot be. Then one random number leads to the token, in the order of the vocabulary.

All rows of a step in one call of ``kernels/choose.cpp`` where it was compiled, otherwise one after another
in numpy, or for small vocabularies as ``distribution.py`` does it. Each way draws the same token but where
the random number falls within a rounding of a border.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtnlg.generation.constraint import MASK
from mtnlg.generation.distribution import inverse_transform, row_probabilities
from mtnlg.generation.native import NativeKernel
from mtnlg.generation.penalties import PENALISE
from mtnlg.generation.sampling import SamplingRules

SMALL = 2048  # tokens of a vocabulary that is sorted as quickly
FEW = 48  # scores that are sorted
LEAST = -87.0  # below this, e to the power of a score counts as 0

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
CHOOSE = NativeKernel(
    "choose.cpp",
    "mtnlg_choose",
    [_POINTER, _INTEGER, _INTEGER, *[_POINTER] * 4, _INTEGER],
    [],
)
LIKELIEST = NativeKernel(
    "choose.cpp",
    "mtnlg_likeliest",
    [_POINTER, _INTEGER, _INTEGER, _INTEGER, *[_POINTER] * 3, _INTEGER],
    [],
)
Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


def load_kernels() -> None:
    """Have the kernels from now on; compiled if this machine has not done so."""
    CHOOSE.load()
    LIKELIEST.load()
    PENALISE.load()
    MASK.load()


def choose(
    logits: Tensor, rules: Sequence[SamplingRules], shares: Sequence[float]
) -> tuple[list[float], list[int]]:
    """The largest logit of each row (NaN where one of them is none) and the row's next token.

    Args:
        logits: float32 [rows, vocab] on the CPU, contiguous.
        rules: one for each row; of them the temperature and what comes after it.
        shares: a random number of 0 to 1 - 2**-32 for each row; not looked at where it is greedy.
    """
    if CHOOSE.loaded is not None:
        best, tokens = np.empty(len(logits), np.float32), np.empty(len(logits), np.int64)
        _call_choose(logits, rules, shares, best, tokens, None)
        return best.tolist(), tokens.tolist()
    rows = logits.numpy()
    places = rows.argmax(axis=-1)
    largest: list[float] = rows[np.arange(len(rows)), places].tolist()
    drawing = [row for row, rule in enumerate(rules) if not rule.is_greedy and np.isfinite(largest[row])]
    if drawing and rows.shape[1] <= SMALL:
        weights = row_probabilities(logits[drawing], [rules[row] for row in drawing])
        numbers = torch.tensor([shares[row] for row in drawing], dtype=torch.float64)
        places[drawing] = inverse_transform(weights, numbers).numpy()
    else:
        for row in drawing:
            places[row] = draw_by_share(_kept_weights(rows[row], rules[row]), shares[row])
    return largest, places.tolist()


def probabilities(logits: Tensor, rules: Sequence[SamplingRules]) -> Tensor:
    """What :func:`choose` draws from: float32 [rows, vocab]; those not finite have no meaning."""
    if CHOOSE.loaded is None and logits.shape[1] <= SMALL:
        return row_probabilities(logits, rules)
    found, places = torch.zeros_like(logits), np.zeros(len(logits), np.int64)
    if CHOOSE.loaded is not None:
        _call_choose(logits, rules, [0.0] * len(rules), np.empty(len(logits), np.float32), places, found)
    else:
        places = logits.numpy().argmax(axis=-1)
        for row, rule in enumerate(rules):
            if not rule.is_greedy:
                weights = _kept_weights(logits[row].numpy(), rule)
                found[row] = torch.from_numpy(weights / np.float32(weights.sum(dtype=np.float64)))
    greedy = [row for row, rule in enumerate(rules) if rule.is_greedy]
    found[greedy, places[greedy]] = 1.0
    return found


def _call_choose(
    logits: Tensor,
    rules: Sequence[SamplingRules],
    shares: Sequence[float],
    best: Floats,
    tokens: Places,
    kept: Tensor | None,
) -> None:
    numbers = np.array([(*rule.of_chance, share) for rule, share in zip(rules, shares)])
    CHOOSE.loaded(
        logits.data_ptr(),
        *logits.shape,
        numbers.ctypes.data,
        best.ctypes.data,
        tokens.ctypes.data,
        None if kept is None else kept.data_ptr(),
        torch.get_num_threads(),
    )


# -- the same in numpy, for one row


@dataclass
class _Pool:
    """Scores that a rule chooses among.

    Args:
        keys: float32 [scores].
        weights: float32 [scores].
    """

    keys: Floats
    weights: Floats

    def above(self, pivot: float) -> float:
        return float(self.weights.sum(where=self.keys > pivot, dtype=np.float64))


def _kept_weights(logits: Floats, rules: SamplingRules) -> Floats:
    """[vocab] proportional to the probabilities that a row's rules draw from."""
    temperature, top_k, top_p, log_min_p, typical_p = rules.of_chance
    with np.errstate(over="ignore"):
        scores = (logits - logits.max()) / np.float32(temperature)
    weights = np.exp(scores)
    weights[scores <= LEAST] = 0.0
    pool, floor = _Pool(scores, weights), float(scores[scores > -np.inf].min())
    if 0 < top_k < len(scores):
        floor = _last_kept(_Pool(scores, np.ones_like(scores)), top_k)
    if top_p < 1.0:
        mass = top_p * float(weights.sum(where=scores >= floor, dtype=np.float64))
        floor = max(floor, _last_kept(pool, mass))
    floor = max(floor, log_min_p)
    if typical_p < 1.0:
        pool = _Pool(_nearness(scores, weights, floor), weights)
        total = float(weights.sum(where=scores >= floor, dtype=np.float64))
        floor = _last_kept(pool, typical_p * total)
    return np.where(pool.keys >= floor, pool.weights, np.float32(0.0))


def _nearness(scores: Floats, weights: Floats, floor: float) -> Floats:
    """Minus the distance between each kept token's information and the entropy of what is kept."""
    kept = scores >= floor
    weights, own = weights[kept].astype(np.float64), scores[kept]
    information = np.float32(weights.dot(own) / weights.sum())  # the score whose information it is
    nearness = np.full_like(scores, -np.inf)
    nearness[kept] = -np.abs(own - information)
    return nearness


def _last_kept(pool: _Pool, mass: float) -> float:
    """The smallest key for which what is above it weighs less than ``mass``."""
    finite = pool.keys > -np.inf
    pool = _Pool(pool.keys[finite], pool.weights[finite])
    above = 0.0  # what is above the whole pool
    low, high = pool.keys.min(), pool.keys.max()
    while low < high and len(pool.keys) > FEW:
        pivot = low + (high - low) * np.float32(0.5)
        pivot = pivot if pivot < high else low
        total = above + pool.above(pivot)
        wanted = pool.keys > pivot
        if total < mass:
            above, wanted = total, ~wanted
        pool = _Pool(pool.keys[wanted], pool.weights[wanted])
        low, high = pool.keys.min(), pool.keys.max()
    order = np.argsort(-pool.keys, kind="stable")
    keys, weights = pool.keys[order], pool.weights[order].astype(np.float64)
    likelier = above + weights.cumsum() - weights
    begins = np.append(True, keys[1:] < keys[:-1])  # of equal keys the first decides
    return float(keys[begins & (likelier < mass)][-1])


def draw_by_share(weights: Floats, share: float) -> int:
    """The first place up to which the weights are more than ``share`` of all; never one of weight 0."""
    cumulative = weights.cumsum(dtype=np.float64)
    return int(cumulative.searchsorted(share * cumulative[-1], side="right"))


# -- the likeliest


def likeliest(logits: Tensor, count: int) -> tuple[list[float], list[list[float]], list[list[int]]]:
    """Of each row log Σ exp(logits), and its ``count`` largest logits and their places, largest first.

    Args:
        logits: float32 [rows, vocab], contiguous.
        count: how many, at most the vocabulary.
    """
    if LIKELIEST.loaded is None or logits.device.type != "cpu":
        # log Σ exp(x) = max x - log(the largest probability), and softmax is the fastest way to it.
        largest = logits.softmax(dim=-1).amax(dim=-1)
        totals = (logits.amax(dim=-1).double() - largest.double().log()).tolist()
        top = logits.topk(count)
        return totals, top.values.tolist(), top.indices.tolist()
    shape = len(logits), count
    sums, values, ids = np.empty(shape[0]), np.empty(shape, np.float32), np.zeros(shape, np.int64)
    LIKELIEST.loaded(
        logits.data_ptr(),
        *logits.shape,
        count,
        sums.ctypes.data,
        values.ctypes.data,
        ids.ctypes.data,
        torch.get_num_threads(),
    )
    return sums.tolist(), values.tolist(), ids.tolist()

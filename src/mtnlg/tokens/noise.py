"""Taking parts out of a text, for a model to put back: T5's random spans (arXiv 1910.10683, 3.1.4)."""

from __future__ import annotations

import numpy as np

from mtnlg.tokens.shuffle import permutation, seed_of


def random_spans(num_tokens: int, num_noise: int, num_spans: int, seed: int) -> np.ndarray:
    """Which of ``num_tokens`` tokens are taken out: bool [tokens].

    Kept and taken stretches take turns, a kept one first. The lengths of each kind are drawn among all
    ways to divide its tokens into ``num_spans`` stretches of one token or more, each as likely.

    Args:
        num_tokens: of the text.
        num_noise: tokens taken out, below ``num_tokens``.
        num_spans: stretches they are in; at most as many as tokens are taken and as are kept.
        seed: of the draw.
    """
    taken = _stretches(num_noise, num_spans, seed_of("taken", seed))
    kept = _stretches(num_tokens - num_noise, num_spans, seed_of("kept", seed))
    lengths = np.stack([kept, taken], axis=1).flatten()
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, lengths)


def _stretches(num_tokens: int, count: int, seed: int) -> np.ndarray:
    """Lengths of ``count`` stretches that ``num_tokens`` tokens are divided into: int64 [count]."""
    cuts = np.sort(permutation(num_tokens - 1, seed)[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=num_tokens)


def replace_spans(tokens: np.ndarray, taken: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """``tokens`` with the n-th stretch of ``taken`` tokens replaced by sentinel n.

    Args:
        tokens: ids [tokens].
        taken: bool [tokens].
        sentinels: ids, at least one for each stretch.
    """
    begins = taken & ~np.concatenate([[False], taken[:-1]])
    replaced = tokens.copy()
    replaced[begins] = sentinels[: int(begins.sum())]
    return replaced[~taken | begins]


def input_and_target(
    tokens: np.ndarray, taken: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What is read and what is to be written, for a text of which the ``taken`` tokens are missing.

    ``a b c d e`` without ``b c`` and ``e`` is read as ``a <0> d <1>``, and ``<0> b c <1> e`` is written.

    Args:
        tokens: ids [tokens].
        taken: bool [tokens], beginning with a kept token and ending with a taken one.
        sentinels: ids, one for each stretch that is taken.
    """
    return replace_spans(tokens, taken, sentinels), replace_spans(tokens, ~taken, sentinels)

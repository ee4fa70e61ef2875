"""The index of one epoch of one corpus: documents in shuffled order, cut into samples, shuffled.

The tokens of all epochs form one endless stream: the documents of epoch 0 in their shuffled order,
then those of epoch 1 in another order, and so on. Sample n reads the sequence_length + 1 tokens from
n * sequence_length on, so that neighbours share one token (the last label of one is the first input of
the next) and no token is left out, not even at the end of an epoch. A sample belongs to the epoch that
its first token is in; the samples of an epoch are read in a shuffled order. These are the document,
sample and shuffle index of Megatron-LM's GPTDataset, made for one epoch at a time.
"""

from __future__ import annotations

import numpy as np

from mtnlg.tokens.shuffle import permutation, seed_of


def first_sample(epoch: int, num_tokens: int, sequence_length: int) -> int:
    """Number of the first sample that starts in ``epoch``."""
    return -(-epoch * num_tokens // sequence_length)


def epoch_of(sample: int, num_tokens: int, sequence_length: int) -> int:
    """The epoch that ``sample`` starts in."""
    return sample * sequence_length // num_tokens


def document_order(num_documents: int, epoch: int, key: str) -> np.ndarray:
    """Documents in the order of ``epoch``: int32 or int64 [documents]."""
    return permutation(num_documents, seed_of(key, "documents", epoch))


def sample_order(num_samples: int, epoch: int, key: str) -> np.ndarray:
    """Samples of ``epoch`` in the order they are read: int32 or int64 [samples]."""
    return permutation(num_samples, seed_of(key, "samples", epoch))


def sample_starts(lengths: np.ndarray, epoch: int, sequence_length: int) -> np.ndarray:
    """Where the samples of an epoch start.

    Args:
        lengths: tokens of each document in the epoch's order.
        epoch: number of the epoch.
        sequence_length: tokens from one start to the next.

    Returns:
        [samples + 1, 2]: position in the document order, and token inside that document. The last row
        is the start of the next epoch's first sample, with position ``len(lengths)`` and the token
        inside the next epoch.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    num_tokens = int(ends[-1])
    first = first_sample(epoch, num_tokens, sequence_length)
    count = first_sample(epoch + 1, num_tokens, sequence_length) - first
    targets = np.arange(count + 1, dtype=np.int64) * sequence_length
    targets += first * sequence_length - epoch * num_tokens
    positions = np.searchsorted(ends, targets, side="right")
    starts = np.empty((count + 1, 2), dtype=np.int32 if len(lengths) < 2**31 - 1 else np.int64)
    starts[:, 0] = positions
    starts[:, 1] = targets - np.where(positions > 0, ends[positions - 1], 0)
    return starts

"""Cutting a long text into windows so that each token is predicted exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mtnlg.tokens.batch import IGNORED_LABEL, Batch

_PIECE = 1 << 20  # tokens of a memory-mapped file read at once


@dataclass(frozen=True)
class Window:
    """One row of input.

    Args:
        ids: [tokens + 1]; token ``i + 1`` is predicted from those up to ``i``.
        num_context: labels at the front that an earlier window has scored already.
    """

    ids: np.ndarray
    num_context: int

    @property
    def num_scored(self) -> int:
        """Labels that count here."""
        return len(self.ids) - 1 - self.num_context


def cut_windows(pieces: Iterable[np.ndarray], before: int, size: int, stride: int) -> Iterator[Window]:
    """Windows of at most ``size`` input tokens over the joined ``pieces``.

    Each window begins ``stride`` tokens after the one before it. With ``stride == size`` they lie side
    by side, and a token's context is what precedes it in its window (none for the first of a window but
    one token). A smaller stride gives every token of all but the first window at least
    ``size - stride`` tokens of context, at ``size / stride`` times the work.

    Args:
        pieces: token ids [any].
        before: the token that the very first one is predicted from.
        size: longest input.
        stride: 1 to ``size``.
    """
    held = np.array([before], dtype=np.int64)
    num_context = 0
    for piece in _small(pieces):
        held = np.concatenate([held, piece])
        while len(held) > size:
            yield Window(held[: size + 1], num_context)
            held, num_context = held[stride:], size - stride
    if len(held) - 1 > num_context:
        yield Window(held, num_context)


def _small(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for piece in pieces:
        for start in range(0, len(piece), _PIECE):
            yield piece[start : start + _PIECE].astype(np.int64)


def make_batch(windows: list[Window], end_of_text_id: int | None) -> Batch:
    """Windows as rows, the shorter ones filled up on the right where nothing is scored.

    Args:
        windows: the rows.
        end_of_text_id: start attention and positions anew after this token; ``None`` never does.
    """
    width = max(len(window.ids) for window in windows) - 1
    inputs = np.zeros((len(windows), width), dtype=np.int64)
    labels = np.full_like(inputs, IGNORED_LABEL)
    for row, window in enumerate(windows):
        count = len(window.ids) - 1
        inputs[row, :count] = window.ids[:-1]
        labels[row, window.num_context : count] = window.ids[1 + window.num_context :]
    batch = Batch(torch.from_numpy(inputs), torch.from_numpy(labels))
    if end_of_text_id is not None:
        batch.document_ids, batch.position_ids = _documents(batch.input_ids == end_of_text_id)
    return batch


def _documents(is_end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the document and position in it, [batch, sequence], from where documents end."""
    begins = torch.zeros_like(is_end)
    begins[:, 1:] = is_end[:, :-1]
    columns = torch.arange(is_end.shape[1]).expand(is_end.shape)
    starts = torch.where(begins, columns, 0).cummax(dim=1).values
    return begins.long().cumsum(dim=1), columns - starts

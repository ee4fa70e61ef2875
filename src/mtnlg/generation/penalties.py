"""The rules that change single logits: bias, penalties, bans and a constraint's mask."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtnlg.generation.constraint import empty_bitmask, rule_out
from mtnlg.generation.history import TokenCounts
from mtnlg.generation.native import NativeKernel

if TYPE_CHECKING:
    from mtnlg.generation.sampler import SamplingState

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
# In one file with those that choose (draws.py), and loaded with them.
PENALISE = NativeKernel(
    "choose.cpp", "mtnlg_penalise", [_POINTER, _INTEGER, _POINTER, _POINTER, _INTEGER, _INTEGER], []
)
LARGEST = torch.finfo(torch.float32).max


def edit_scores(scores: Tensor, states: Sequence[SamplingState]) -> bool:
    """Change the scores as each row's rules say, all but temperature and truncation.

    In this order: logit bias, repetition penalty, frequency and presence penalty, n-grams that would
    come twice, end tokens that would come too early, the constraint. Only the tokens concerned are
    touched, so the cost goes with the length of the sequences and not with the vocabulary.

    Args:
        scores: float32 [rows, vocab], contiguous, overwritten.
        states: one for each row.

    Returns:
        Whether anything may have changed.
    """
    flat, vocab = scores.view(-1), scores.shape[-1]
    rows = [(row * vocab, state) for row, state in enumerate(states)]
    biased = [(start, state) for start, state in rows if state.bias is not None]
    counted = [(start, state) for start, state in rows if state.counts is not None]
    if biased:
        _add_bias(flat, biased)
    if counted:
        _penalise(flat, counted, vocab)
    is_banned = _ban(flat, rows, vocab)
    constrained = [row for row, state in enumerate(states) if state.constraint is not None]
    if constrained:
        _mask(scores, constrained, states)
    return bool(biased or counted or is_banned or constrained)


Rows = Sequence[tuple[int, "SamplingState"]]  # where a row begins in the flat scores, and its state


def _add_bias(flat: Tensor, rows: Rows) -> None:
    biases = [state.bias for _, state in rows if state.bias is not None]
    places = np.concatenate([ids + start for (start, _), (ids, _) in zip(rows, biases)])
    values = np.concatenate([values for _, values in biases])
    index = _on(flat, places)
    flat[index] = flat[index] + _on(flat, values)


def _penalise(flat: Tensor, rows: Rows, vocab: int) -> None:
    # No further than the inverse of it is a float32 too.
    repetition = [min(max(state.rules.repetition_penalty, 1e-30), 1e30) for _, state in rows]
    counts = [state.counts for _, state in rows if state.counts is not None]
    if PENALISE.loaded is None or flat.device.type != "cpu":
        _penalise_in_torch(flat, rows, counts, repetition)
        return
    places = [(start // vocab, len(own.ids), *own.addresses) for (start, _), own in zip(rows, counts)]
    given = [(state.rules.frequency_penalty, state.rules.presence_penalty) for _, state in rows]
    seen = np.array(places, dtype=np.int64)
    penalties = np.array([(r, *others) for r, others in zip(repetition, given)])
    PENALISE.loaded(
        *(flat.data_ptr(), vocab, seen.ctypes.data, penalties.ctypes.data),
        *(len(rows), torch.get_num_threads()),
    )


def _penalise_in_torch(
    flat: Tensor, rows: Rows, counts: Sequence[TokenCounts], repetition: Sequence[float]
) -> None:
    lengths = [len(count.ids) for count in counts]
    places = np.concatenate([count.ids + start for (start, _), count in zip(rows, counts)])
    if not len(places):
        return
    rules = [state.rules for _, state in rows]

    def of_rows(values: Sequence[float]) -> Tensor:
        return _on(flat, np.repeat(np.asarray(values, dtype=np.float32), lengths))

    index = _on(flat, places)
    touched = flat[index]
    penalty = of_rows(repetition)
    touched = torch.where(touched < 0, touched * penalty, touched / penalty)
    if any(rule.frequency_penalty or rule.presence_penalty for rule in rules):
        number = _on(flat, np.concatenate([count.counts for count in counts]))
        touched = touched - of_rows([rule.frequency_penalty for rule in rules]) * number
        touched = touched - of_rows([rule.presence_penalty for rule in rules]) * (number > 0)
    # A number that grew past all bounds is the largest one, so that no difference becomes NaN.
    flat[index] = touched.clamp(max=LARGEST)


def _ban(flat: Tensor, rows: Rows, vocab: int) -> bool:
    """Rule out what would repeat an n-gram, and end tokens before their time."""
    banned: list[int] = []
    for start, state in rows:
        if state.ngrams is not None:
            banned += [start + token for token in state.ngrams.banned]
        if len(state.new_ids) < state.min_new_tokens:
            banned += [start + token for token in state.end_ids if token < vocab]
    if banned:
        flat[_on(flat, np.asarray(banned, dtype=np.int64))] = float("-inf")
    return bool(banned)


def _mask(scores: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
    bitmask = empty_bitmask(len(rows), scores.shape[-1])
    for words, row in zip(bitmask, rows):
        constraint = states[row].constraint
        assert constraint is not None
        constraint.fill_mask(words)
    rule_out(scores, rows, bitmask)


def _on(like: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)

"""How the tokens of a step are laid out: one after the other, those alike beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mtnlg.generation.row_counts import filled_up
from mtnlg.generation.runner import Row

FEWEST_OF_A_PIECE = 16  # new tokens of a row from which on its queries go through attention together
SMALL_PAGES = 64  # pages read in vain that are not worth a call of their own
MOST_SINGLES = 128  # tokens of one call, whose attention weights are all held
TOGETHER = 16  # tokens of a row that read its pages together


@dataclass
class Singles:
    """Tokens that attend each for itself, over pages of similar number.

    Args:
        tokens: where they stand in the step.
        pages: [tokens, pages of the longest].
        lengths: [tokens] keys that each sees, its own included.
    """

    tokens: slice
    pages: Tensor
    lengths: Tensor


@dataclass
class Piece:
    """Many new tokens of one row, which attend together.

    Args:
        tokens: where they stand in the step.
        start: tokens of the row before these.
        pages: [pages] that hold them all.
    """

    tokens: slice
    start: int
    pages: Tensor

    @property
    def end(self) -> int:
        """Tokens of the row, these included."""
        return self.start + self.tokens.stop - self.tokens.start


@dataclass
class StepPlan:
    """Where everything of a step is.

    Args:
        num_tokens: new tokens of all rows; what stands behind them only fills up.
        ids: [tokens and filling].
        positions: [tokens and filling].
        pages: [tokens] page that each is filed in.
        places: [tokens] place in it.
        singles: single tokens.
        pieces: pieces of prompts.
        of_rows: for each row, where its tokens stand, in order.
    """

    num_tokens: int
    ids: Tensor
    positions: Tensor
    pages: Tensor
    places: Tensor
    singles: list[Singles]
    pieces: list[Piece]
    of_rows: list[np.ndarray]


@dataclass
class TokenPlan:
    """Where everything of a step is for which each token attends for itself, row after row.

    Args:
        ids: [tokens].
        positions: [tokens].
        new_pages: [tokens] page that each is filed in.
        new_places: [tokens] place in it.
        pages: [rows, pages of the longest].
        lengths: [tokens] keys that each sees, its own included.
        groups: [groups, 3]: first token, number of tokens that follow each other, row.
        wanted: [logits] tokens whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    new_pages: Tensor
    new_places: Tensor
    pages: Tensor
    lengths: Tensor
    groups: Tensor
    wanted: Tensor


def plan_tokens(rows: Sequence[Row], page_size: int) -> TokenPlan:
    """Lay the rows out as they come, for a CPU.

    Args:
        rows: of the step.
        page_size: tokens of a page.
    """
    counts = np.array([len(row.ids) for row in rows])
    starts = np.array([row.start for row in rows])
    ends = counts.cumsum()
    firsts = ends - counts
    held = (starts + counts - 1) // page_size + 1
    pages = np.zeros((len(rows), held.max()), dtype=np.int64)
    for own, row, count in zip(pages, rows, held):
        own[:count] = row.pages[:count]
    if counts.max() == 1:
        ids = np.array([row.ids[0] for row in rows], dtype=np.int64)
        positions, of_row = starts, np.arange(len(rows))
        groups = np.stack([of_row, counts, of_row], axis=1)
    else:
        ids = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
        of_row = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(ids)) + (starts - firsts)[of_row]
        groups = _token_groups(firsts, counts)
    logits = [place for end, row in zip(ends.tolist(), rows) for place in range(end - row.num_logits, end)]
    found = ids, positions, pages[of_row, positions // page_size], positions % page_size
    wanted = np.array(logits, dtype=np.int64)
    return TokenPlan(*map(torch.from_numpy, (*found, pages, positions + 1, groups, wanted)))


def cut_rows(rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """The same tokens in the same order, at most so many at a time; logits stay with their tokens."""
    some: list[Row] = []
    room = most
    for row in rows:
        begin, count = 0, len(row.ids)
        while begin < count:
            end = min(begin + room, count)
            some.append(row if end - begin == count else _part(row, begin, end))
            begin, room = end, room - (end - begin)
            if not room:
                yield some
                some, room = [], most
    if some:
        yield some


def _part(row: Row, begin: int, end: int) -> Row:
    """Some of its tokens, with those of its logits that are theirs."""
    num_behind = len(row.ids) - end
    num_logits = min(end - begin, max(0, row.num_logits - num_behind))
    return replace(row, ids=row.ids[begin:end], start=row.start + begin, num_logits=num_logits)


def _token_groups(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Tokens that follow each other, some at a time: [groups, 3]."""
    groups = [
        (first + begin, min(TOGETHER, count - begin), row)
        for row, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist()))
        for begin in range(0, count, TOGETHER)
    ]
    return np.array(groups)


def plan_step(
    rows: Sequence[Row], page_size: int, fewest: int, only_singles: bool, device: torch.device
) -> StepPlan:
    """Lay the rows out.

    Args:
        rows: of the step.
        page_size: tokens of a page.
        fewest: tokens that a step should have at least; rows of zeros fill up (:func:`filled_up`).
        only_singles: every token attends for itself, so that it does not matter how a prompt was cut.
        device: of the model.
    """
    counts = [len(row.ids) for row in rows]
    if max(counts) == 1 and _are_alike(rows, page_size):
        return plan_single_tokens(rows, page_size, fewest, device)
    is_single = [only_singles or count < FEWEST_OF_A_PIECE for count in counts]
    ids = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
    positions = np.concatenate([np.arange(row.start, row.start + len(row.ids)) for row in rows])
    of_row = np.repeat(np.arange(len(rows)), counts)
    # Singles first, the longest first; then the pieces, each in its own order.
    single = np.asarray(is_single)[of_row]
    order = np.lexsort((np.where(single, -positions, 0), ~single))
    ids, positions, of_row = ids[order], positions[order], of_row[order]
    tables = [np.asarray(row.pages, dtype=np.int64) for row in rows]
    pages = np.fromiter(
        (tables[row][place] for row, place in zip(of_row, positions // page_size)), np.int64, len(ids)
    )
    num_singles = int(single.sum())
    singles = [
        _singles(begin, end, of_row, positions, tables, page_size, device)
        for begin, end in _groups(positions[:num_singles] // page_size + 1)
    ]
    pieces, begin = [], num_singles
    for row, count, alone, table in zip(rows, counts, is_single, tables):
        if not alone:
            held = torch.from_numpy(table[: -(-(row.start + count) // page_size)]).to(device)
            pieces.append(Piece(slice(begin, begin + count), row.start, held))
            begin += count
    where = np.empty(len(order), dtype=np.int64)
    where[order] = np.arange(len(order))
    filling = np.zeros(filled_up(len(ids), fewest) - len(ids), dtype=np.int64)
    return StepPlan(
        len(ids),
        torch.from_numpy(np.concatenate([ids, filling])).to(device),
        torch.from_numpy(np.concatenate([positions, filling])).to(device),
        torch.from_numpy(pages).to(device),
        torch.from_numpy(positions % page_size).to(device),
        singles,
        pieces,
        np.split(where, np.cumsum(counts)[:-1]),
    )


def _are_alike(rows: Sequence[Row], page_size: int) -> bool:
    """Whether so few pages would be read in vain that all rows should attend together."""
    num_pages = [row.start // page_size + 1 for row in rows]
    in_vain = max(num_pages) * len(rows) - sum(num_pages)
    return in_vain <= SMALL_PAGES and len(rows) <= MOST_SINGLES


def plan_single_tokens(rows: Sequence[Row], page_size: int, fewest: int, device: torch.device) -> StepPlan:
    """The usual step, laid out without detours: one token for each row, all in one group.

    Args:
        rows: with one id each.
        page_size: see :func:`plan_step`.
        fewest: likewise.
        device: likewise.
    """
    num_pages = [row.start // page_size + 1 for row in rows]
    longest = max(num_pages)
    filling = [0] * (filled_up(len(rows), fewest) - len(rows))
    starts = [row.start for row in rows]
    numbers = torch.tensor([[*(row.ids[0] for row in rows), *filling], [*starts, *filling]])
    tables = torch.tensor(
        [[*row.pages[:count], *[0] * (longest - count)] for row, count in zip(rows, num_pages)]
    )
    new_pages = torch.tensor([row.pages[count - 1] for row, count in zip(rows, num_pages)], device=device)
    ids, positions = numbers.to(device)
    tables, held = tables.to(device), positions[: len(rows)]
    singles = [Singles(slice(0, len(rows)), tables, held + 1)]
    of_rows = [np.array([index]) for index in range(len(rows))]
    return StepPlan(len(rows), ids, positions, new_pages, held % page_size, singles, [], of_rows)


def _groups(num_pages: np.ndarray) -> list[tuple[int, int]]:
    """Cut tokens, the longest first, so that few pages are read in vain: [(begin, end)]."""
    groups, begin = [], 0
    while begin < len(num_pages):
        longest = num_pages[begin]
        short = np.flatnonzero(num_pages[begin:] * 2 < longest)
        end = min(len(num_pages), begin + MOST_SINGLES)
        if len(short) and (longest - num_pages[begin + short]).sum() > SMALL_PAGES:
            end = min(end, begin + int(short[0]))
        groups.append((begin, end))
        begin = end
    return groups


def _singles(
    begin: int,
    end: int,
    of_row: np.ndarray,
    positions: np.ndarray,
    tables: list[np.ndarray],
    page_size: int,
    device: torch.device,
) -> Singles:
    longest = int(positions[begin]) // page_size + 1
    pages = np.zeros((end - begin, longest), dtype=np.int64)
    for index, (row, position) in enumerate(zip(of_row[begin:end], positions[begin:end])):
        own = tables[row][: position // page_size + 1]
        pages[index, : len(own)] = own
    lengths = torch.from_numpy(positions[begin:end] + 1).to(device)
    return Singles(slice(begin, end), torch.from_numpy(pages).to(device), lengths)

"""What rank 0 tells the other ranks of a model: one message of small integers for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.runner import Row

CAPACITY = 4096  # numbers of the first message; what does not fit comes in a second one


class Command(IntEnum):
    """What rank 0 asks of the others."""

    WAIT = 0
    SET_UP = 1
    RUN = 2
    HIDDEN = 3
    COPY_PAGES = 4
    END = 5
    ADAPTER = 6  # bytes follow
    FORGET = 7


class Commands:
    """The messages from rank 0 to all others.

    Args:
        group: all ranks, on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def send(self, command: Command, numbers: Sequence[int] = ()) -> None:
        """Rank 0's side."""
        content = torch.tensor([len(numbers), command, *numbers], dtype=torch.int32)
        first = torch.zeros(CAPACITY, dtype=torch.int32)
        first[: len(content)] = content[:CAPACITY]
        dist.broadcast(first, src=0, group=self.group)
        if len(content) > CAPACITY:
            dist.broadcast(content[CAPACITY:].clone(), src=0, group=self.group)

    def send_bytes(self, content: Tensor) -> None:
        """Rank 0's side: uint8 [count], whose length the others know."""
        dist.broadcast(content, src=0, group=self.group)

    def receive_bytes(self, count: int) -> Tensor:
        """The others' side."""
        content = torch.empty(count, dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self.group)
        return content

    def receive(self) -> tuple[Command, list[int]]:
        """The others' side."""
        first = torch.zeros(CAPACITY, dtype=torch.int32)
        dist.broadcast(first, src=0, group=self.group)
        length, command = first[:2].tolist()
        numbers = first[2 : 2 + length].tolist()
        if len(numbers) < length:
            rest = torch.zeros(length - len(numbers), dtype=torch.int32)
            dist.broadcast(rest, src=0, group=self.group)
            numbers += rest.tolist()
        return Command(command), numbers


def pack_rows(rows: Sequence[Row]) -> list[int]:
    """Rows as numbers; of their adapters the serials, counted from 1."""
    numbers = [len(rows)]
    for row in rows:
        adapter = 0 if row.adapter is None else row.adapter.serial + 1
        source = row.source or ()
        numbers += [len(row.ids), row.start, row.num_logits, adapter, len(row.pages), len(source)]
        numbers += [*row.ids, *row.pages, *source]
    return numbers


def unpack_rows(numbers: Sequence[int], adapters: Mapping[int, LoadedAdapter]) -> list[Row]:
    """The rows again, with the adapters of these serials."""
    rows, place = [], 1
    for _ in range(numbers[0]):
        count, start, num_logits, adapter, num_pages, num_read = numbers[place : place + 6]
        ends = [place + 6, place + 6 + count, place + 6 + count + num_pages]
        place = ends[-1] + num_read
        ids, pages, source = (numbers[i:j] for i, j in zip(ends, [*ends[1:], place]))
        loaded = adapters[adapter - 1] if adapter else None
        rows.append(Row(ids, start, pages, num_logits, tuple(source) or None, loaded))
    return rows

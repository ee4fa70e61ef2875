"""How one tensor of others' files becomes parameters of ours, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs is one or more of ours.

    Both ways are made of views and of views put together, so a tensor that is still in its file stays
    there until it is known which of its numbers are wanted.

    Args:
        theirs: its name in the family.
        ours: our parameters, which theirs holds one after the other along the output axis.
        is_transposed: theirs is [in, out] (GPT-2's ``Conv1D``) where ours is [out, in].
        expert: theirs is this one's matrix of our parameter, which holds those of all experts.
        sizes: outputs of each of ours; ``None`` is equal parts.
        heads: theirs holds the first of so many heads of each of ours, then the second, ...; ``None`` is
            one of ours after the other.
        shape: of theirs; ``None`` is not known.
    """

    theirs: str
    ours: tuple[str, ...]
    is_transposed: bool = False
    expert: int | None = None
    sizes: tuple[int, ...] | None = None
    heads: int | None = None
    shape: tuple[int, ...] | None = None

    def to_theirs(self, tensors: list[Tensor]) -> Tensor:
        """Ours → theirs."""
        if self.expert is not None:
            return tensors[0][self.expert]
        if self.heads is not None:
            by_head = zip(*(tensor.chunk(self.heads) for tensor in tensors))
            tensors = [part for head in by_head for part in head]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined.t() if self.is_transposed else joined

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        """Theirs → ours, as views where it can be."""
        tensor = tensor.t() if self.is_transposed else tensor
        count = len(self.ours)
        if self.heads is not None:
            parts = tensor.chunk(self.heads * count)
            return [torch.cat(parts[number::count]) for number in range(count)]
        parts = tensor.chunk(count) if self.sizes is None else tensor.split(self.sizes)
        return list(parts)

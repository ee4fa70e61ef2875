"""Low-rank updates of several adapters beside one matrix, each for the tokens of its own requests.

A of all adapters lie in one matrix, B of all in another. A step multiplies all its tokens by both, and
between the two sets to zero what belongs to other adapters, so that its cost does not grow with the number
of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.linears import Linear
from mtnlg.interop.adapter import LowRank
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.low_rank import dense_weight
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS

TOKENS_AT_A_TIME = 64  # of one exact product, all of whose terms are held


@dataclass
class StepAdapters:
    """Who of a step's tokens has which adapter.

    Args:
        slots: [tokens and filling] place of its adapter among those laid out, -1 for none.
        tokens: of each adapter that is at work.
        turned: tokens whose adapter has magnitudes (DoRA).
        prompts: where virtual tokens with an embedding stand, and which row of the table each is.
        prefixes: the same of those with keys and values.
        masks: made so far, by the ranks they are for.
    """

    slots: Tensor
    tokens: dict[int, Tensor]
    turned: Tensor | None
    prompts: tuple[Tensor, Tensor] | None = None
    prefixes: tuple[Tensor, Tensor] | None = None
    masks: dict[tuple[tuple[int, int], ...], Tensor] = field(default_factory=dict)

    def mask(self, ranks: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Tensor:
        """[tokens, columns]: 1 where a column (of so many for each slot) is the token's own."""
        found = self.masks.get(ranks)
        if found is None:
            owners = torch.tensor([slot for slot, rank in ranks for _ in range(rank)])
            found = (self.slots[:, None] == owners.to(self.slots.device)).to(dtype)
            self.masks[ranks] = found
        return found


def step_of_slots(slots: np.ndarray, turned: Sequence[int], device: torch.device) -> StepAdapters:
    """A step without virtual tokens.

    Args:
        slots: see :class:`StepAdapters`.
        turned: slots of adapters with magnitudes.
        device: of the model.
    """
    put = lambda found: torch.from_numpy(found).to(device)  # noqa: E731
    present = [int(slot) for slot in np.unique(slots) if slot >= 0]
    places = np.flatnonzero(np.isin(slots, turned)) if turned else np.empty(0, dtype=np.int64)
    tokens = {slot: put(np.flatnonzero(slots == slot)) for slot in present}
    return StepAdapters(put(slots), tokens, put(places) if len(places) else None)


class Base(Protocol):
    """The matrices below the updates: of a whole model, or what a rank has of them."""

    def weight(self, name: str) -> Tensor:
        """[out, in] of the linear layer ``name``."""

    def bias(self, name: str) -> Tensor | None:
        """[out] that its product has in it."""

    def part(self, name: str, one: LowRank) -> LowRank:
        """What of an update belongs beside :meth:`weight`."""

    def whole_squares(self, name: str, squares: Tensor) -> Tensor:
        """Sums of squares over whole rows [out], from those over :meth:`weight`'s."""

    def part_of_heads(self, prefix: Tensor) -> Tensor:
        """Of keys and values [2, heads, count, head_dim] those that are computed here."""


class WholeBase:
    """The matrices of a model that is here (:class:`Base`)."""

    def __init__(self, model: MegatronLmDecoder) -> None:
        self._model = model

    def weight(self, name: str) -> Tensor:
        """See :class:`Base`."""
        return dense_weight(self._model.get_submodule(name)).detach()

    def bias(self, name: str) -> Tensor | None:
        """See :class:`Base`."""
        bias = getattr(self._model.get_submodule(name), "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def part(self, name: str, one: LowRank) -> LowRank:
        """See :class:`Base`."""
        return one

    def whole_squares(self, name: str, squares: Tensor) -> Tensor:
        """See :class:`Base`."""
        return squares

    def part_of_heads(self, prefix: Tensor) -> Tensor:
        """See :class:`Base`."""
        return prefix


class AtWork(Protocol):
    """Knows which adapters are laid out and whose tokens a step has."""

    step: StepAdapters | None
    members: list[LoadedAdapter]
    version: int
    base: Base
    dtype: torch.dtype
    device: torch.device
    is_invariant: bool


@dataclass
class Stacked:
    """The updates of one matrix, all adapters side by side.

    Args:
        down: [columns, in].
        up: [columns, out], scaled.
        ranks: columns of each slot, in order.
        factors: [slots, out] of DoRA, 1 where there is none; ``None`` where nobody has any.
        bias: [out] that the product has in it, where somebody has factors.
    """

    down: Tensor
    up: Tensor
    ranks: tuple[tuple[int, int], ...]
    factors: Tensor | None = None
    bias: Tensor | None = None

    def change(self, product: Tensor, rows: Tensor, step: StepAdapters) -> None:
        """Add every token's update to ``product`` [tokens, out], in place."""
        self.add(product, F.linear(rows, self.down), step)

    def add(self, product: Tensor, low: Tensor, step: StepAdapters) -> None:
        """The same, where ``low`` [tokens, columns] are the inputs by A."""
        product.addmm_(low * step.mask(self.ranks, low.dtype), self.up)

    def change_exactly(self, product: Tensor, rows: Tensor, step: StepAdapters) -> None:
        """The same, with sums that do not depend on other tokens and adapters."""

        def low(tokens: Tensor, columns: slice) -> Tensor:
            return (rows[tokens][:, None] * self.down[columns]).sum(-1, dtype=torch.float32)

        self.add_exactly(product, low, step)

    def add_exactly(
        self, product: Tensor, low: Callable[[Tensor, slice], Tensor], step: StepAdapters
    ) -> None:
        """The same, where ``low`` gives the inputs of some tokens by some columns of A."""
        begin = 0
        for slot, rank in self.ranks:
            own = slice(begin, begin + rank)
            begin += rank
            tokens = step.tokens.get(slot)
            for some in () if tokens is None else tokens.split(TOKENS_AT_A_TIME):
                added = (low(some, own)[:, None] * self.up[own].T.contiguous()).sum(-1)
                product[some] += added.to(product.dtype)

    def turn(self, product: Tensor, step: StepAdapters) -> None:
        """DoRA: give each output its trained length, in place."""
        if self.factors is None or step.turned is None:
            return
        factors, part = self.factors[step.slots[step.turned]], product[step.turned]
        bias = self.bias
        product[step.turned] = part * factors if bias is None else (part - bias) * factors + bias


class Updates:
    """The updates of one matrix, stacked anew whenever others are laid out.

    Args:
        at_work: knows who is.
        sizes: outputs of each linear layer of which the matrix consists, by name; of a single one they
            need not be known.
    """

    def __init__(self, at_work: AtWork, sizes: Mapping[str, int | None]) -> None:
        self._at_work, self._sizes = at_work, sizes
        self._stacked: Stacked | None = None
        self._version = 0

    def stacked(self) -> Stacked | None:
        """Those of the adapters that are laid out now; ``None`` where none changes this matrix."""
        if self._version != self._at_work.version:
            self._version = self._at_work.version
            self._stacked = self._stack(self._at_work.members)
        return self._stacked

    def _stack(self, members: Sequence[LoadedAdapter]) -> Stacked | None:
        kind: dict[str, Any] = {"dtype": self._at_work.dtype, "device": self._at_work.device}
        found: dict[tuple[int, str], LowRank] = {}
        for slot, member in enumerate(members):
            for name in self._sizes:
                one = member.adapter.low_rank.get(name)
                if one is not None:
                    found[slot, name] = self._at_work.base.part(name, one)
        if not found:
            return None
        ends = np.cumsum([size or len(next(iter(found.values())).up) for size in self._sizes.values()])
        places = {
            name: slice(end - len_, end)
            for name, end, len_ in zip(self._sizes, ends, np.diff(ends, prepend=0))
        }
        ups, ranks = [], [0] * len(members)
        for (slot, name), one in found.items():
            up = torch.zeros(len(one.down), int(ends[-1]), **kind)
            up[:, places[name]] = (one.up.float() * one.scale).T.to(**kind)
            ups.append(up)
            ranks[slot] += len(one.down)
        down = torch.cat([one.down.to(**kind) for one in found.values()])
        stacked = Stacked(
            down, torch.cat(ups), tuple((slot, rank) for slot, rank in enumerate(ranks) if rank)
        )
        turned = {key: one for key, one in found.items() if one.magnitude is not None}
        if turned:
            stacked.factors = torch.ones(len(members), int(ends[-1]), **kind)
            for (slot, name), one in turned.items():
                stacked.factors[slot, places[name]] = self._factor(name, one).to(**kind)
            stacked.bias = self._bias(places, int(ends[-1]))
        return stacked

    def _factor(self, name: str, one: LowRank) -> Tensor:
        """DoRA's length of each row by the one that the sum of matrix and update has, [out]."""
        assert one.magnitude is not None
        base = self._at_work.base
        weight = base.weight(name).float()
        total = torch.addmm(weight, one.up.to(weight), one.down.to(weight), alpha=one.scale)
        norms = base.whole_squares(name, total.square().sum(dim=1)).sqrt()
        return one.magnitude.to(norms) / norms

    def _bias(self, places: Mapping[str, slice], count: int) -> Tensor | None:
        biases = {name: self._at_work.base.bias(name) for name in places}
        if all(bias is None for bias in biases.values()):
            return None
        whole = torch.zeros(count, dtype=self._at_work.dtype, device=self._at_work.device)
        for name, bias in biases.items():
            if bias is not None:
                whole[places[name]] = bias.to(whole)
        return whole


class AdaptedLinear:
    """A matrix of the prepared model with the updates of whoever is at work.

    Args:
        base: without them.
        at_work: knows who is.
        sizes: see :class:`Updates`.
    """

    def __init__(self, base: Linear, at_work: AtWork, sizes: Mapping[str, int | None]) -> None:
        self.base, self._at_work, self._updates = base, at_work, Updates(at_work, sizes)
        self.num_bytes = base.num_bytes

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~mtnlg.generation.linears.Linear`."""
        step = self._at_work.step
        stacked = None if step is None else self._updates.stacked()
        if step is None or stacked is None:
            return self.base(rows, activation, plus, times)
        product = self.base(rows)
        if self._at_work.is_invariant:
            stacked.change_exactly(product, rows, step)
        else:
            stacked.change(product, rows, step)
        stacked.turn(product, step)
        if plus is not None:
            return product + plus
        if times is not None:
            return product * times
        return product if activation is None else ACTIVATION_FUNCTIONS[activation](product)


class AdaptedLookUp:
    """The table of embeddings with the updates of whoever is at work.

    Args:
        base: embeddings of tokens, [tokens] → [tokens, width].
        at_work: knows who is.
        name: of the table.
    """

    def __init__(self, base: Callable[[Tensor], Tensor], at_work: AtWork, name: str) -> None:
        self._base, self._at_work, self._updates = base, at_work, Updates(at_work, {name: None})

    def __call__(self, ids: Tensor) -> Tensor:
        """[tokens] → [tokens, width]"""
        found, step = self._base(ids), self._at_work.step
        stacked = None if step is None else self._updates.stacked()
        if step is None or stacked is None:
            return found
        table = stacked.down.T
        if self._at_work.is_invariant:
            stacked.add_exactly(found, lambda tokens, columns: table[ids[tokens], columns].float(), step)
        else:
            stacked.add(found, table[ids], step)
        return found

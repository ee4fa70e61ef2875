"""Several adapters in one step of the fast runner, each for the tokens of its own requests.

Low-rank updates of all adapters that are at work lie side by side: A of all in one matrix, B of all in
another. A step multiplies all its tokens by both, and between the two sets to zero what belongs to other
adapters, so that its cost does not grow with the number of requests. Where no request has an adapter,
nothing but one question per matrix is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.linears import Linear
from mtnlg.generation.prepared import PreparedDecoder
from mtnlg.generation.prepared_blocks import PreparedMlp
from mtnlg.generation.runner import Row
from mtnlg.generation.step_plan import StepPlan
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.low_rank import dense_weight
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS

MOST_IDLE = 4  # adapters whose updates stay laid out, beside those at work
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
    prompts: tuple[Tensor, Tensor] | None
    prefixes: tuple[Tensor, Tensor] | None
    masks: dict[tuple[tuple[int, int], ...], Tensor] = field(default_factory=dict)

    def mask(self, ranks: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Tensor:
        """[tokens, columns]: 1 where a column (of so many for each slot) is the token's own."""
        found = self.masks.get(ranks)
        if found is None:
            owners = torch.tensor([slot for slot, rank in ranks for _ in range(rank)])
            found = (self.slots[:, None] == owners.to(self.slots.device)).to(dtype)
            self.masks[ranks] = found
        return found


@dataclass
class Stacked:
    """The updates of one matrix, all adapters side by side.

    Args:
        down: [columns, in].
        up: [columns, out], scaled.
        ranks: columns of each slot, in order.
        factors: [slots, out] of DoRA, 1 where there is none; ``None`` where nobody has any.
    """

    down: Tensor
    up: Tensor
    ranks: tuple[tuple[int, int], ...]
    factors: Tensor | None

    def change(self, product: Tensor, rows: Tensor, step: StepAdapters) -> None:
        """Add every token's update to ``product`` [tokens, out], in place."""
        product.addmm_(F.linear(rows, self.down) * step.mask(self.ranks, rows.dtype), self.up)

    def change_exactly(self, product: Tensor, rows: Tensor, step: StepAdapters) -> None:
        """The same, with sums that do not depend on other tokens and adapters."""
        begin = 0
        for slot, rank in self.ranks:
            own = slice(begin, begin + rank)
            begin += rank
            tokens = step.tokens.get(slot)
            for some in () if tokens is None else tokens.split(TOKENS_AT_A_TIME):
                low = (rows[some][:, None] * self.down[own]).sum(-1, dtype=torch.float32)
                added = (low[:, None] * self.up[own].T.contiguous()).sum(-1)
                product[some] += added.to(product.dtype)

    def turn(self, product: Tensor, bias: Tensor | None, step: StepAdapters) -> None:
        """DoRA: give each output its trained length, in place."""
        if self.factors is None or step.turned is None:
            return
        factors, part = self.factors[step.slots[step.turned]], product[step.turned]
        product[step.turned] = part * factors if bias is None else (part - bias) * factors + bias


class AdaptedLinear:
    """A matrix of the prepared model with the updates of whoever is at work.

    Args:
        base: without them.
        mixer: knows who is at work.
        parts: name and module of each linear layer of which the matrix consists.
    """

    def __init__(self, base: Linear, mixer: AdapterMixer, parts: Sequence[tuple[str, nn.Module]]) -> None:
        self.base, self._mixer, self._parts = base, mixer, parts
        self.num_bytes = base.num_bytes
        self._stacked: Stacked | None = None
        self._version = 0
        given = [module.bias for _, module in parts if getattr(module, "bias", None) is not None]
        biases = [bias.detach() for bias in given if isinstance(bias, Tensor)]
        self._bias = torch.cat(biases).to(mixer.dtype) if biases else None

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~mtnlg.generation.linears.Linear`."""
        step = self._mixer.step
        stacked = None if step is None else self._updates()
        if step is None or stacked is None:
            return self.base(rows, activation, plus, times)
        product = self.base(rows)
        if self._mixer.is_invariant:
            stacked.change_exactly(product, rows, step)
        else:
            stacked.change(product, rows, step)
        stacked.turn(product, self._bias, step)
        if plus is not None:
            return product + plus
        if times is not None:
            return product * times
        return product if activation is None else ACTIVATION_FUNCTIONS[activation](product)

    def _updates(self) -> Stacked | None:
        """Those of the adapters that are laid out now; ``None`` where none changes this matrix."""
        if self._version != self._mixer.version:
            self._version = self._mixer.version
            self._stacked = self._stack(self._mixer.members)
        return self._stacked

    def _stack(self, members: Sequence[LoadedAdapter]) -> Stacked | None:
        kind: dict[str, Any] = {"dtype": self._mixer.dtype, "device": self._mixer.device}
        linears: list[Any] = [module for _, module in self._parts]
        sizes = [int(module.out_features) for module in linears]
        ends = np.cumsum(sizes).tolist()
        downs, ups, ranks = [], [], []
        factors = torch.ones(len(members), ends[-1], **kind)
        is_turned = False
        for slot, member in enumerate(members):
            rank = 0
            for (name, module), size, end in zip(self._parts, sizes, ends):
                one = member.adapter.low_rank.get(name)
                if one is None:
                    continue
                up = torch.zeros(len(one.down), ends[-1], **kind)
                up[:, end - size : end] = (one.up.float() * one.scale).T.to(**kind)
                downs.append(one.down.to(**kind))
                ups.append(up)
                rank += len(one.down)
                if one.magnitude is not None:
                    is_turned = True
                    weight = dense_weight(module).detach().float()
                    total = torch.addmm(weight, one.up.to(weight), one.down.to(weight), alpha=one.scale)
                    norms = torch.linalg.vector_norm(total, dim=1)
                    factors[slot, end - size : end] = (one.magnitude.to(norms) / norms).to(**kind)
            if rank:
                ranks.append((slot, rank))
        if not downs:
            return None
        return Stacked(torch.cat(downs), torch.cat(ups), tuple(ranks), factors if is_turned else None)


class AdapterMixer:
    """Lets the matrices and tokens of a prepared model follow the adapters of each step.

    Args:
        decoder: the prepared model, which is changed.
        model: the model it was made from.
        is_invariant: a token's numbers must not depend on who else is in the step.

    Attributes:
        step: the present one's; ``None`` where nobody has an adapter.
        members: adapters that are laid out.
        version: changes with them.
    """

    def __init__(self, decoder: PreparedDecoder, model: MegatronLmDecoder, is_invariant: bool) -> None:
        self.is_invariant, self.dtype = is_invariant, decoder.dtype
        self.device = next(model.parameters()).device
        self.step: StepAdapters | None = None
        self.members: list[LoadedAdapter] = []
        self.version = 0
        self._config, self._model = model.config, model
        self._look_up: Callable[[Tensor], Tensor] = decoder.look_up
        decoder.look_up = self._embed  # type: ignore[method-assign]
        self._prompts = torch.empty(0)
        self._prefixes: list[Tensor] = []
        self._firsts = np.zeros(0, dtype=np.int64)  # row of each member's first virtual token in the tables
        self._wrap(decoder)

    def _wrap(self, decoder: PreparedDecoder) -> None:
        for layer in decoder.layers:
            name = f"layers.{layer.index}"
            three = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
            layer.query_key_value = self._adapted(layer.query_key_value, three)
            layer.output = self._adapted(layer.output, [f"{name}.attention.output"])
            if isinstance(layer.mlp, PreparedMlp):
                self._wrap_mlp(layer.mlp, f"{name}.mlp")
            elif layer.mlp.shared is not None:
                self._wrap_mlp(layer.mlp.shared, f"{name}.mlp.shared")

    def _wrap_mlp(self, mlp: PreparedMlp, name: str) -> None:
        mlp.up = self._adapted(mlp.up, [f"{name}.up"])
        mlp.down = self._adapted(mlp.down, [f"{name}.down"])
        if mlp.gate is not None:
            mlp.gate = self._adapted(mlp.gate, [f"{name}.gate"])

    def _adapted(self, base: Linear, names: list[str]) -> Linear:
        return AdaptedLinear(base, self, [(name, self._model.get_submodule(name)) for name in names])

    # -- a step

    def begin(self, rows: Sequence[Row], plan: StepPlan) -> None:
        """The next step consists of these rows, laid out so."""
        wanted = {row.adapter: None for row in rows if row.adapter is not None}
        if not wanted:
            self.step = None
            return
        self._lay_out(list(wanted))
        slot_of = {member: slot for slot, member in enumerate(self.members)}
        slots = np.full(len(plan.ids), -1, dtype=np.int64)
        for row, own in zip(rows, plan.of_rows):
            if row.adapter is not None:
                slots[own] = slot_of[row.adapter]
        ids = plan.ids.cpu().numpy()
        is_virtual = (slots >= 0) & (ids >= self._config.vocab_size)
        prefixed = [slot for slot, member in enumerate(self.members) if member.adapter.prefix is not None]
        has_prefix = is_virtual & np.isin(slots, prefixed)
        turned = [slot for slot, member in enumerate(self.members) if member.adapter.config.decomposed]
        tokens_turned = np.flatnonzero(np.isin(slots, turned)) if turned else np.empty(0, dtype=np.int64)
        put = lambda found: torch.from_numpy(found).to(self.device)  # noqa: E731
        self.step = StepAdapters(
            put(slots),
            {slot_of[one]: put(np.flatnonzero(slots == slot_of[one])) for one in wanted},
            put(tokens_turned) if len(tokens_turned) else None,
            self._numbered(is_virtual & ~has_prefix, slots, ids),
            self._numbered(has_prefix, slots, ids),
        )

    def _numbered(
        self, chosen: np.ndarray, slots: np.ndarray, ids: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        """Where some of the virtual tokens stand, and which rows of the tables they are."""
        places = np.flatnonzero(chosen)
        if not len(places):
            return None
        numbers = self._firsts[slots[places]] + ids[places] - self._config.vocab_size
        return torch.from_numpy(places).to(self.device), torch.from_numpy(numbers).to(self.device)

    def _lay_out(self, wanted: list[LoadedAdapter]) -> None:
        """See that these are laid out; a few that were needed before stay."""
        new = [one for one in wanted if one not in self.members]
        if not new and len(self.members) <= len(wanted) + MOST_IDLE:
            return
        idle = [one for one in self.members if one not in wanted]
        self.members = [*idle[len(idle) - MOST_IDLE // 2 :], *wanted]
        self.version += 1
        counts = [member.num_virtual for member in self.members]
        self._firsts = np.cumsum([0, *counts[:-1]])
        total, config = sum(counts), self._config
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self._prompts = torch.zeros(total, config.embedding_width, **kind)
        width = 2 * config.key_value_heads * config.head_size
        self._prefixes = []
        if any(member.adapter.prefix is not None for member in self.members):
            self._prefixes = [torch.zeros(total, width, **kind) for _ in range(config.num_hidden_layers)]
        for member, first, count in zip(self.members, self._firsts, counts):
            if member.adapter.prompt is not None:
                self._prompts[first : first + count] = member.adapter.prompt.to(**kind)
            if member.adapter.prefix is None:
                continue
            for table, prefix in zip(self._prefixes, member.adapter.prefix):
                # [2, heads, count, head_dim] → [count, 2 · heads · head_dim]
                table[first : first + count] = prefix.permute(2, 0, 1, 3).flatten(1).to(**kind)

    def _embed(self, ids: Tensor) -> Tensor:
        step = self.step
        if step is None or (step.prompts is None and step.prefixes is None):
            return self._look_up(ids)
        found = self._look_up(ids.clamp(max=self._config.vocab_size - 1))
        if step.prompts is not None:
            places, numbers = step.prompts
            found[places] = self._prompts[numbers]
        return found

    def put_prefixes(self, layer: int, projected: Tensor) -> None:
        """Give virtual tokens the keys and values that were trained for them, in place.

        Args:
            layer: its number.
            projected: [tokens, (heads + 2 · key_value_heads) · head_dim].
        """
        step = self.step
        if step is None or step.prefixes is None:
            return
        (places, numbers), table = step.prefixes, self._prefixes[layer]
        projected[places, projected.shape[1] - table.shape[1] :] = table[numbers]

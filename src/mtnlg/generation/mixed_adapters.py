"""Several adapters in one step of a fast runner, each for the tokens of its own requests.

Where no request has an adapter, nothing but one question per matrix is added
(:mod:`.stacked_updates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import EMBEDDING_TARGET, HEAD_TARGET
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.linears import Linear
from mtnlg.generation.prepared import PreparedHead
from mtnlg.generation.prepared_blocks import PreparedMlp
from mtnlg.generation.prepared_layers import PreparedLayer
from mtnlg.generation.runner import Row
from mtnlg.generation.stacked_updates import (
    AdaptedLinear,
    AdaptedLookUp,
    Base,
    StepAdapters,
    step_of_slots,
)
from mtnlg.generation.step_plan import StepPlan

MOST_IDLE = 4  # adapters whose updates stay laid out, beside those at work


class Prepared(Protocol):
    """A prepared model, or a rank's stage of one."""

    config: MegatronModelConfig
    dtype: torch.dtype
    device: torch.device
    look_up: Callable[[Tensor], Tensor] | None  # embeddings of tokens, where they are here
    output: Linear | None  # the head's matrix, where it is here

    @property
    def all_layers(self) -> Iterable[PreparedLayer]:
        """Those that are here."""


class AdapterMixer:
    """Lets the matrices and tokens of a prepared model follow the adapters of each step.

    Args:
        prepared: is changed.
        base: the matrices that it was made from.
        is_invariant: a token's numbers must not depend on who else is in the step.

    Attributes:
        step: the present one's; ``None`` where nobody has an adapter.
        members: adapters that are laid out.
        version: changes with them.
    """

    def __init__(self, prepared: Prepared, base: Base, is_invariant: bool) -> None:
        self.base, self.is_invariant = base, is_invariant
        self.dtype, self.device = prepared.dtype, prepared.device
        self.step: StepAdapters | None = None
        self.members: list[LoadedAdapter] = []
        self.version = 0
        self._config, self._slots = prepared.config, np.zeros(0, dtype=np.int64)
        self._prompts = torch.empty(0)
        self._prefixes: dict[int, Tensor] = {}
        self._firsts = np.zeros(0, dtype=np.int64)  # row of each member's first virtual token in the tables
        self._layers = [layer.index for layer in prepared.all_layers]
        self._wrap(prepared)

    def _wrap(self, prepared: Prepared) -> None:
        for layer in prepared.all_layers:
            name = f"layers.{layer.index}"
            three = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
            sizes = dict(zip(three, layer.sizes))
            layer.query_key_value = AdaptedLinear(layer.query_key_value, self, sizes)
            layer.output = self._adapted(layer.output, f"{name}.attention.output")
            if isinstance(layer.mlp, PreparedMlp):
                self._wrap_mlp(layer.mlp, f"{name}.mlp")
                continue
            if layer.mlp.shared is not None:
                self._wrap_mlp(layer.mlp.shared, f"{name}.mlp.shared")
            if layer.mlp.shared_gate is not None:
                layer.mlp.shared_gate = self._adapted(layer.mlp.shared_gate, f"{name}.mlp.shared_gate")
        if prepared.look_up is not None:
            self._look_up = AdaptedLookUp(prepared.look_up, self, EMBEDDING_TARGET)
            prepared.look_up = self._embed
        if isinstance(prepared.output, PreparedHead):
            prepared.output.output = self._adapted(prepared.output.output, HEAD_TARGET)
        elif prepared.output is not None:
            prepared.output = self._adapted(prepared.output, HEAD_TARGET)

    def _wrap_mlp(self, mlp: PreparedMlp, name: str) -> None:
        mlp.up = self._adapted(mlp.up, f"{name}.up")
        mlp.down = self._adapted(mlp.down, f"{name}.down")
        if mlp.gate is not None:
            mlp.gate = self._adapted(mlp.gate, f"{name}.gate")

    def _adapted(self, linear: Linear, name: str) -> Linear:
        own: Linear | None = getattr(linear, "own", None)
        if own is None:
            return AdaptedLinear(linear, self, {name: None})
        # Its products are summed over ranks, and so are the updates' parts in them.
        linear.own = AdaptedLinear(own, self, {name: None})  # type: ignore[attr-defined]
        return linear

    # -- a step

    def begin(self, rows: Sequence[Row], plan: StepPlan) -> None:
        """The next step consists of these rows, laid out so; :meth:`lay_out` has seen them."""
        if all(row.adapter is None for row in rows):
            self.step = None
            return
        slot_of = {member: slot for slot, member in enumerate(self.members)}
        slots = self._slots = np.full(len(plan.ids), -1, dtype=np.int64)
        for row, own in zip(rows, plan.of_rows):
            if row.adapter is not None:
                slots[own] = slot_of[row.adapter]
        ids = plan.ids.cpu().numpy()
        is_virtual = (slots >= 0) & (ids >= self._config.vocab_size)
        prefixed = [slot for slot, member in enumerate(self.members) if member.adapter.prefix is not None]
        has_prefix = is_virtual & np.isin(slots, prefixed)
        self.step = replace(
            step_of_slots(slots, self._turned, self.device),
            prompts=self._numbered(is_virtual & ~has_prefix, slots, ids),
            prefixes=self._numbered(has_prefix, slots, ids),
        )

    def narrow(self, places: Sequence[int]) -> None:
        """What comes next of the step is about some of its tokens only."""
        if self.step is not None:
            self.step = step_of_slots(self._slots[np.asarray(places)], self._turned, self.device)

    @property
    def _turned(self) -> list[int]:
        return [slot for slot, member in enumerate(self.members) if member.adapter.config.decomposed]

    def _numbered(
        self, chosen: np.ndarray, slots: np.ndarray, ids: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        """Where some of the virtual tokens stand, and which rows of the tables they are."""
        places = np.flatnonzero(chosen)
        if not len(places):
            return None
        numbers = self._firsts[slots[places]] + ids[places] - self._config.vocab_size
        return torch.from_numpy(places).to(self.device), torch.from_numpy(numbers).to(self.device)

    def lay_out(self, rows: Sequence[Row]) -> None:
        """See that the adapters of these rows are laid out; a few that were needed before stay."""
        wanted = list({row.adapter: None for row in rows if row.adapter is not None})
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
        self._prefixes = {}
        for member, first, count in zip(self.members, self._firsts, counts):
            if member.adapter.prompt is not None:
                prompt, scale = member.adapter.prompt.to(**kind), config.embedding_scale
                if scale is not None:  # as mtnlg.model.virtual_tokens
                    prompt = prompt / prompt.new_tensor(scale)
                self._prompts[first : first + count] = prompt
            if member.adapter.prefix is not None:
                self._put_prefix(member.adapter.prefix, slice(first, first + count), total)

    def _put_prefix(self, prefix: Tensor, places: slice, total: int) -> None:
        """Into the tables of the layers that are here."""
        for layer in self._layers:
            # [2, heads, count, head_dim] → [count, 2 · heads · head_dim]
            rows = self.base.part_of_heads(prefix[layer]).permute(2, 0, 1, 3).flatten(1)
            if layer not in self._prefixes:
                shape = (total, rows.shape[1])
                self._prefixes[layer] = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._prefixes[layer][places] = rows.to(self._prefixes[layer])

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

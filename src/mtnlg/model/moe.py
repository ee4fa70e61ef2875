"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538), dropless (MegaBlocks, arXiv 2211.15841).

Tokens are sorted by expert and each expert multiplies its own contiguous rows, however many they are:
no capacity, no padding, no dropped token. Shared experts, through which every token goes, are one wider
MLP (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS, Mlp
from mtnlg.model.router import Router


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows by the transposed matrix of its expert.

    Args:
        rows: [rows, in], sorted by expert.
        weight: [experts, out, in].
        counts: [experts] rows of each expert.

    Returns:
        [rows, out]
    """
    groups = rows.split(counts.tolist())
    return torch.cat([group @ matrix.t() for group, matrix in zip(groups, weight.unbind())])


class Experts(nn.Module):
    """The MLPs of all experts: each matrix of theirs is one parameter [experts, out, in].

    One parameter for all, because then experts are divided over ranks like the rows of any other
    matrix (checkpoints of one layout open in another), one message gathers them, and one kernel may
    multiply them all. ``grouped_product`` is an attribute so that a layout can put its own in.
    """

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        experts, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
        assert experts is not None
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]
        self.gate = nn.Parameter(torch.empty(experts, ffn, hidden)) if config.is_gated else None
        self.up = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn))
        for weight in self.parameters():
            nn.init.normal_(weight, 0.0, config.init_std)
        self.grouped_product: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_product

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [rows, hidden] sorted by expert, ``counts`` [experts] of each → [rows, hidden]"""
        up = self.grouped_product(rows, self.up, counts)
        gate = None if self.gate is None else self.grouped_product(rows, self.gate, counts)
        return self.grouped_product(self.activate(up, gate), self.down, counts)

    def activate(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """act(up), or act(gate) · up: [rows, ffn] → [rows, ffn]"""
        return self.activation(up) if gate is None else self.activation(gate) * up


def run_here(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """All experts are in this process."""
    return experts(rows, counts)


class MixtureOfExperts(nn.Module):
    """The sum over a token's experts of weight · expert(x), plus the shared experts.

    ``run_experts(experts, rows, counts)`` is an attribute so that a layout can put its own in.
    """

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = self.shared_gate = None
        if config.num_shared_experts:
            self.shared = Mlp(config, config.shared_expert_size)
        if config.shared_expert_gate:
            self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.run_experts: Callable[[Experts, Tensor, Tensor], Tensor] = run_here

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        weights, selected, counts = self.router(hidden)
        num_selected = selected.shape[-1]
        order = selected.flatten().argsort(stable=True)  # the choices of all tokens, by expert
        # A copy of each token for each of its experts: its gradients are then added in a fixed order.
        copies = hidden.flatten(0, -2)[:, None].expand(-1, num_selected, -1).flatten(0, 1)
        done = self.run_experts(self.experts, copies.index_select(0, order), counts.sum(dim=0))
        outputs = torch.zeros_like(done).index_copy(0, order, done).unflatten(0, (-1, num_selected))
        # [tokens, 1, experts per token] by [tokens, experts per token, hidden]
        mixed = torch.bmm(weights.flatten(0, -2)[:, None].to(done.dtype), outputs).view_as(hidden)
        if self.shared is None:
            return mixed
        shared = self.shared(hidden)
        return mixed + (shared if self.shared_gate is None else self.shared_gate(hidden).sigmoid() * shared)

"""Norms, MLPs and mixtures of experts in the form in which generation runs them (:mod:`.prepared`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.linears import Linear, PlainLinear, make_linear
from mtnlg.generation.quantized_linears import make_quantized_linear
from mtnlg.generation.row_counts import filled_up
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS, Mlp
from mtnlg.model.moe import MixtureOfExperts
from mtnlg.model.norms import RMSNorm1p
from mtnlg.quantization import QuantizedLinear

UNGATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class PreparedNorm:
    """LayerNorm or RMSNorm in another dtype, or none."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        self.is_none = isinstance(norm, nn.Identity)
        if self.is_none:
            return
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, Tensor) and norm.eps is not None
        self.shape, self.eps = tuple(weight.shape), float(norm.eps)  # type: ignore[arg-type]
        self.weight = (weight.float() + 1.0 if isinstance(norm, RMSNorm1p) else weight).to(dtype)
        self.bias = bias.to(dtype) if isinstance(bias, Tensor) else None
        self.is_rms = isinstance(norm, nn.RMSNorm)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., size] → [..., size]"""
        if self.is_none:
            return rows
        if self.is_rms:
            return torch.rms_norm(rows, self.shape, self.weight, self.eps)
        return torch.layer_norm(rows, self.shape, self.weight, self.bias, self.eps)


class PreparedMlp:
    """down(act(up(x))) or down(act(gate(x)) · up(x)), plus the residual stream.

    Args:
        up: matrix and bias.
        gate: likewise, or ``None``.
        down: likewise.
        activation: name in the config.
    """

    def __init__(self, up: Linear, gate: Linear | None, down: Linear, activation: str) -> None:
        self.up, self.gate, self.down = up, gate, down
        self.activation = UNGATED.get(activation, activation)

    def __call__(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        """[rows, hidden] → [rows, hidden]"""
        if self.gate is not None:
            between = self.up(rows, times=self.gate(rows, self.activation))
        elif self.activation == "squared_relu":
            between = self.up(rows, "relu").square()
        else:
            between = self.up(rows, self.activation)
        return self.down(between, plus=plus)

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        return [linear for linear in (self.up, self.gate, self.down) if linear is not None]


class PreparedExperts:
    """A mixture of experts, each of them prepared (:class:`mtnlg.model.moe.MixtureOfExperts`)."""

    def __init__(
        self,
        mixture: MixtureOfExperts,
        activation: str,
        dtype: torch.dtype,
        fewest: int,
        in_tiles: bool = False,
    ) -> None:
        make = partial(_linear, dtype=dtype, in_tiles=in_tiles)
        experts, self.fewest = mixture.experts, fewest
        gates = [None] * len(experts.up) if experts.gate is None else list(experts.gate.detach())
        self.experts = [
            PreparedMlp(make(up), None if gate is None else make(gate), make(down), activation)
            for up, gate, down in zip(experts.up.detach(), gates, experts.down.detach())
        ]
        shared = mixture.shared
        self.shared = None if shared is None else prepared_mlp(shared, activation, dtype, in_tiles)
        gate = mixture.shared_gate
        self.shared_gate: Linear | None = None  # [1, hidden]
        if gate is not None:
            weight = gate.weight.detach().to(dtype)
            self.shared_gate = PlainLinear(weight, None, ACTIVATION_FUNCTIONS, is_copy=False)
        score = mixture.router.weight.detach().float()
        self.score = _linear(score, torch.float32, in_tiles)
        self.router = copy.copy(mixture.router)  # the same weights under another product
        self.router.logits_function = lambda hidden, weight: self.score(hidden[0].float())[None]

    def __call__(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        """[rows, hidden] → [rows, hidden]"""
        weights, selected, counts = self.router(rows[None])
        order = selected.flatten().argsort(stable=True)
        numbers = counts.sum(dim=0).tolist()
        copies = rows.index_select(0, order // selected.shape[-1]).split(numbers)
        done = [self._run(expert, own) for expert, own in zip(self.experts, copies) if len(own)]
        outputs = rows.new_empty(len(order), rows.shape[1])
        outputs.index_copy_(0, order, torch.cat(done))
        # [rows, experts of each, hidden]
        mixed = (outputs.unflatten(0, (len(rows), -1)) * weights[0, :, :, None].to(rows.dtype)).sum(1)
        if self.shared is not None and self.shared_gate is not None:
            mixed = mixed + self.shared_gate(rows).sigmoid() * self.shared(rows)
        elif self.shared is not None:
            mixed = self.shared(rows, plus=mixed)
        return mixed if plus is None else mixed + plus

    def _run(self, expert: PreparedMlp, rows: Tensor) -> Tensor:
        missing = filled_up(len(rows), self.fewest) - len(rows)
        return expert(F.pad(rows, (0, 0, 0, missing)))[: len(rows)] if missing > 0 else expert(rows)

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        mlps = [*self.experts, *([] if self.shared is None else [self.shared])]
        return [self.score, *(linear for mlp in mlps for linear in mlp.linears)]


def _linear(weight: Tensor, dtype: torch.dtype, in_tiles: bool) -> Linear:
    return make_linear([weight], [None], dtype, ACTIVATION_FUNCTIONS, in_tiles)


def prepared_linear(
    modules: Sequence[nn.Linear | QuantizedLinear], dtype: torch.dtype, in_tiles: bool = False
) -> Linear:
    """One linear layer that gives the outputs of several side by side."""
    quantized = [module for module in modules if isinstance(module, QuantizedLinear)]
    if len(quantized) == len(modules):
        return make_quantized_linear(quantized, dtype, ACTIVATION_FUNCTIONS, in_tiles)
    biases = [None if module.bias is None else module.bias.detach() for module in modules]
    weights = [module.weight.detach() for module in modules]
    return make_linear(weights, biases, dtype, ACTIVATION_FUNCTIONS, in_tiles)


def prepared_mlp(mlp: Mlp, activation: str, dtype: torch.dtype, in_tiles: bool = False) -> PreparedMlp:
    """``mlp`` in the form in which generation runs it."""
    gate = None if mlp.gate is None else prepared_linear([mlp.gate], dtype, in_tiles)
    up, down = (prepared_linear([module], dtype, in_tiles) for module in (mlp.up, mlp.down))
    return PreparedMlp(up, gate, down, activation)

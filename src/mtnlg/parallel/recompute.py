"""Activation recomputation: what each layer keeps for its backward pass and what it computes again.

===============  ==========================================================  ==========================
operator         forgotten                                                   computed again
===============  ==========================================================  ==========================
normalization    results of the layer's two norms (with sequence             norm (and gather)
                 parallelism also the gathered sequence)
activation       what goes into the MLP's last matrix                        activation function
attention        attention weights                                           attention
linear           queries, keys, values; what goes into the activation;       first matrices, attention
                 implies ``attention``
===============  ==========================================================  ==========================

``selective`` is attention alone, whose weights are large for their FLOPs; ``full`` keeps a layer's
input only (Korthikanti et al. 2022, arXiv 2205.05198). Numbers are those of a run without
recomputation, bit for bit, dropout included. Compilation is set here too: it must know what is
recomputed around or inside a compiled layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtnlg.config import TrainingConfig
from mtnlg.model import DecoderLayer, Experts, MegatronLmDecoder
from mtnlg.model.encoder_decoder import DroppingMlp
from mtnlg.model.mlp import Mlp
from mtnlg.parallel import remake
from mtnlg.parallel.activation_budget import FULL, Budget, Level
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.offload import LayerMemory, Offload

Forward = Callable[..., Tensor]


def recompute_activations(decoder: MegatronLmDecoder, switches: TrainingConfig, mesh: Mesh) -> None:
    """Let each layer keep less for its backward pass, as ``switches.activation_recomputation`` says.

    Args:
        decoder: the model, or one stage of it.
        switches: ``none``, ``selective``, ``operators``, ``budget`` or ``full``, and what belongs to
            it; whether what is kept is kept on the CPU; whether layers are compiled.
        mesh: where it runs.
    """
    device = mesh.device
    what = switches.activation_recomputation
    dropout = decoder.config.hidden_dropout > 0 or decoder.config.attention_dropout > 0
    adapter = getattr(decoder, "adapter", None)
    dropout = dropout or (adapter is not None and adapter.dropout > 0)
    layers = [layer for layer in decoder.layers.values() if isinstance(layer, DecoderLayer)]
    assert len(layers) == len(decoder.layers)
    if switches.compile:
        for layer in layers:
            _compile(layer, what, dropout, device)
        return
    if what == "none" and not switches.activation_offload:
        return
    budget = None
    if what == "budget":
        budget = Budget(layers, switches.activation_memory_budget, mesh.largest_in_stage)
    offload = Offload(device) if switches.activation_offload else None
    chosen = {"selective": frozenset(["attention"]), "full": FULL}
    chosen["operators"] = frozenset(switches.recomputed_operators)
    operators = chosen.get(what, frozenset())
    for layer in layers:
        _set_operators(layer, dropout, device)
        run = _Layer(layer, operators, dropout, budget, offload, is_first=layer is layers[0])
        _set(layer, "forward", partial(run, layer.forward))


def _compile(layer: DecoderLayer, what: str, keeps_random_state: bool, device: torch.device) -> None:
    """``torch.compile`` the layer by itself: one compilation serves all layers, and names stay."""
    if what == "selective" and device.type == "cpu":
        for attention in layer.attentions:
            weights = _checkpoint(attention.attention_function, keeps_random_state)
            attention.attention_function = torch.compiler.disable(weights)
    if what == "full":  # inside a compiled layer a checkpoint would keep it from being compiled
        _set(layer, "forward", _checkpoint(torch.compile(layer.forward), keeps_random_state))
    else:
        layer.compile()


class _Layer:
    """One layer's forward pass, which keeps what it is told to.

    Args:
        layer: whose it is.
        operators: those that are computed again.
        keeps_random_state: whether dropout must repeat its masks.
        budget: chooses the operators when the shapes are known.
        offload: where what is kept waits; ``None`` is where it is.
        is_first: whether it is the first layer of its stage.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        operators: Level,
        keeps_random_state: bool,
        budget: Budget | None,
        offload: Offload | None,
        is_first: bool,
    ) -> None:
        self.layer = layer
        self.operators = operators
        self.keeps_random_state = keeps_random_state
        self.budget = budget
        self.offload = offload
        self.is_first = is_first

    def __call__(self, forward: Forward, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if self.budget is not None:
            self.operators = self.budget.level_of(self.layer, partial(self._run, forward, None), inputs)
        memory = self.offload.of_layer(self.layer, self.is_first) if self.offload else None
        return self._run(forward, memory, self.operators, *inputs)

    def _run(self, forward: Forward, memory: LayerMemory | None, operators: Level, *inputs: Any) -> Tensor:
        keep = memory.keep if memory else None
        if operators == FULL:
            with remake.remaking(frozenset(), keep):
                return _checkpoint(_inside(forward), self.keeps_random_state)(*inputs)
        with remake.remaking(operators, keep):
            return forward(*inputs)


def _set_operators(layer: DecoderLayer, keeps_random_state: bool, device: torch.device) -> None:
    """Make the results that may be forgotten known; whether they are is decided in each forward pass."""
    for norm in layer.stream_norms:
        _set(norm, "forward", partial(remake.result_of, "normalization", norm.forward))
    for block in layer.mlp.modules():
        if isinstance(block, (Mlp, Experts)) and not (
            isinstance(block, DroppingMlp) and keeps_random_state
        ):
            _set(block, "activate", partial(remake.result_of, "activation", block.activate))
        if isinstance(block, Mlp):  # the experts' own products are computed again by ``full`` only
            for linear in (block.gate, block.up):
                if linear is not None:
                    _set(linear, "forward", partial(remake.result_of, "linear", linear.forward))
    for attention in layer.attentions:
        attend = _checkpoint(_inside(attention.attend), keeps_random_state)
        _set(attention, "attend", partial(_if_remade, "linear", attend, attention.attend))
        if device.type == "cpu":  # a GPU's fused kernels never keep the weights
            weights = _checkpoint(attention.attention_function, keeps_random_state)
            function = partial(_if_remade, "attention", weights, attention.attention_function)
            attention.attention_function = function


def _if_remade(operator: str, again: Forward, plain: Forward, *inputs: Any) -> Tensor:
    return (again if remake.is_remade(operator) else plain)(*inputs)


def _inside(block: Forward) -> Forward:
    """A block that is recomputed as a whole, and forgets nothing in itself while it is."""

    def whole(*inputs: Any) -> Tensor:
        with remake.keeping():
            return block(*inputs)

    return whole


def _checkpoint(block: Forward, keeps_random_state: bool) -> Forward:
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=keeps_random_state)


def _set(module: nn.Module, name: str, function: Forward) -> None:
    # Attributes of the instance are replaced instead of wrapping the module: names stay.
    setattr(module, name, function)

"""A decoder in the form in which generation runs it: one token after the other, weights laid out once.

The model stays as it is; this takes its modules' weights and does what they do, over a flat list of
tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.linears import Linear
from mtnlg.generation.prepared_blocks import PreparedNorm, prepared_linear
from mtnlg.generation.prepared_layers import Attend, PreparedLayer, TokenRotations, prepare_layer
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.attention import Attention, scaled_dot_product
from mtnlg.model.attention_scores import ScoredAttention
from mtnlg.model.decoder import Embedding, Head
from mtnlg.model.layers import ParallelLayer, PostNormLayer, SandwichLayer
from mtnlg.model.loss import softcapped
from mtnlg.model.mlp import Mlp
from mtnlg.model.moe import Experts, MixtureOfExperts, run_here
from mtnlg.model.norms import RMSNorm1p
from mtnlg.model.router import Router
from mtnlg.quantization import QuantizedLinear

TORCH_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.ModuleDict)
OWN_MODULES = (
    MegatronLmDecoder,
    Embedding,
    DecoderLayer,
    ParallelLayer,
    PostNormLayer,
    SandwichLayer,
    RMSNorm1p,
    Attention,
    Mlp,
    MixtureOfExperts,
    Experts,
    Router,
    Head,
    QuantizedLinear,
)


def can_prepare(model: MegatronLmDecoder) -> bool:
    """Whether the model consists of nothing but what is prepared here, whole and untouched."""
    if model.embedding is None or model.head is None or not len(model.layers):
        return False
    parameters = list(model.parameters())
    if any(type(parameter) is not nn.Parameter or parameter.is_meta for parameter in parameters):
        return False
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
        return False
    if type(model).forward is not MegatronLmDecoder.forward:
        return False
    for module in model.modules():
        is_known = type(module) in (*TORCH_MODULES, *OWN_MODULES)
        if not is_known and module is not model and not _is_no_norm(module, model):
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, Attention) and not _is_attended_here(module):
            return False
        if isinstance(module, MixtureOfExperts) and module.run_experts is not run_here:
            return False
    return True


def _is_no_norm(module: nn.Module, model: MegatronLmDecoder) -> bool:
    """Whether it stands where post-norm models have no last norm."""
    return type(module) is nn.Identity and model.head is not None and module is model.head.norm


def _is_attended_here(attention: Attention) -> bool:
    function = attention.attention_function
    return function is scaled_dot_product or type(function) is ScoredAttention


class PreparedHead:
    """The output projection with what stands around it in some models: a narrower width, a soft cap."""

    def __init__(self, output: Linear, head: Head, dtype: torch.dtype, in_tiles: bool) -> None:
        self.output, self.softcap = output, head.softcap
        self.projection = None
        if head.projection is not None:
            self.projection = prepared_linear([head.projection], dtype, in_tiles)
        self.num_bytes = output.num_bytes

    def __call__(self, rows: Tensor, *others: Any, **options: Any) -> Tensor:
        """[rows, hidden] → [rows, vocab]"""
        if self.projection is not None:
            rows = self.projection(rows)
        return softcapped(self.output(rows, *others, **options), self.softcap)


def prepared_head(output: Linear, head: Head, dtype: torch.dtype, in_tiles: bool = False) -> Linear:
    """``output``, or with what stands around it."""
    if head.projection is None and head.softcap is None:
        return output
    return PreparedHead(output, head, dtype, in_tiles)


class PreparedDecoder:
    """The whole decoder over a flat list of tokens.

    Args:
        model: as :func:`can_prepare` allows; its embeddings are used where they lie.
        dtype: to compute in.
        fewest: rows that a product should have at least.
        in_tiles: see :func:`~mtnlg.generation.linears.make_linear`.
    """

    def __init__(
        self, model: MegatronLmDecoder, dtype: torch.dtype, fewest: int, in_tiles: bool = False
    ) -> None:
        assert model.embedding is not None and model.head is not None
        self.config, self.dtype = model.config, dtype
        activation = model.config.activation_function
        self.tokens = model.embedding.tokens.weight.detach()
        self.device = self.tokens.device
        self.look_up: Callable[[Tensor], Tensor] | None = self._look_up
        embedding = model.embedding
        positions, self.scale = embedding.positions, embedding.scale
        self.positions = (
            None if positions is None else positions.weight.detach()[embedding.position_offset :]
        )
        self.embedding_norm = None if embedding.norm is None else PreparedNorm(embedding.norm, dtype)
        self.projection = None
        if embedding.projection is not None:
            self.projection = embedding.projection.weight.detach().to(dtype)
        self.layers: list[PreparedLayer] = []
        for layer in model.layers.values():
            assert isinstance(layer, DecoderLayer)
            self.layers.append(prepare_layer(layer, activation, dtype, fewest, in_tiles))
        self.scores = {layer.index: layer.scores for layer in self.layers}
        self.norm = PreparedNorm(model.head.norm, dtype)
        output = prepared_linear([model.head.output], dtype, in_tiles)
        self.output = prepared_head(output, model.head, dtype, in_tiles)

    def _look_up(self, ids: Tensor) -> Tensor:
        return self.tokens[ids].to(self.dtype)

    def embed(self, ids: Tensor, positions: Tensor, without_adapters: bool = False) -> Tensor:
        """What goes into the first layer: [tokens] → [tokens, hidden]"""
        assert self.look_up is not None
        hidden = (self._look_up if without_adapters else self.look_up)(ids)  # [tokens] → [tokens, width]
        if self.scale is not None:
            hidden = hidden * hidden.new_tensor(self.scale)
        if self.projection is not None:
            hidden = F.linear(hidden, self.projection)
        if self.positions is not None:
            hidden = hidden + self.positions[positions].to(self.dtype)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return hidden

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """After the last layer, before the final norm: [tokens] → [tokens, hidden]"""
        hidden = self.embed(ids, positions)
        rotations = TokenRotations(self.config, positions, self.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotations.of_layer(layer), attend)
        return hidden

    @property
    def all_layers(self) -> list[PreparedLayer]:
        """In their order."""
        return self.layers

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices beside the model's own."""
        linears = [self.output, *(linear for layer in self.layers for linear in layer.linears)]
        return sum(linear.num_bytes for linear in linears)

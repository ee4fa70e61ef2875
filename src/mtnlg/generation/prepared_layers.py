"""Layers in the form in which generation runs them (:mod:`.prepared`), a class for each of the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.generation.linears import Linear
from mtnlg.generation.prepared_blocks import (
    PreparedExperts,
    PreparedMlp,
    PreparedNorm,
    prepared_linear,
    prepared_mlp,
)
from mtnlg.model import DecoderLayer
from mtnlg.model.attention_scores import ScoredAttention
from mtnlg.model.layers import ParallelLayer, PostNormLayer, SandwichLayer
from mtnlg.model.moe import MixtureOfExperts
from mtnlg.model.positions import Rotation, Rotations, rotate

# (layer, queries, keys and values [tokens, (heads + 2 · key_value_heads) · head_dim])
# → [tokens, heads · head_dim]
Attend = Callable[[int, Tensor], Tensor]


class PreparedLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)); :func:`prepare_layer` makes those of other kinds.

    Attributes:
        scores: what is done with the scores of attention besides; ``None`` is nothing.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        activation: str,
        dtype: torch.dtype,
        fewest: int,
        in_tiles: bool = False,
    ) -> None:
        attention = layer.attention
        self.index, self.head_size = attention.layer_index, attention.head_size
        function = attention.attention_function
        self.scores = function if isinstance(function, ScoredAttention) else None
        self.query_scale = attention.query_scale
        self.attention_norm = PreparedNorm(layer.attention_norm, dtype)
        self.mlp_norm = PreparedNorm(layer.mlp_norm, dtype)
        three = (attention.query, attention.key, attention.value)
        self.sizes = [linear.out_features for linear in three]
        self.query_key_value = prepared_linear(three, dtype, in_tiles)
        self.output = prepared_linear([attention.output], dtype, in_tiles)
        self.query_norm = self.key_norm = None
        if attention.query_norm is not None and attention.key_norm is not None:
            self.query_norm = PreparedNorm(attention.query_norm, dtype)
            self.key_norm = PreparedNorm(attention.key_norm, dtype)
        self.mlp: PreparedMlp | PreparedExperts
        if isinstance(layer.mlp, MixtureOfExperts):
            self.mlp = PreparedExperts(layer.mlp, activation, dtype, fewest, in_tiles)
        else:
            self.mlp = prepared_mlp(layer.mlp, activation, dtype, in_tiles)

    def __call__(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        attended = self._attended(self.attention_norm(hidden), rotation, attend)
        hidden = self.output(attended, plus=hidden)
        return self.mlp(self.mlp_norm(hidden), plus=hidden)

    def _attended(self, rows: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, heads · head_dim]"""
        projected = self.query_key_value(rows)
        if rotation is not None or self.query_norm is not None:
            self._turn(projected, rotation)
        if self.query_scale != 1.0:
            projected[:, : self.sizes[0]] *= self.query_scale
        return attend(self.index, projected)

    def _turn(self, projected: Tensor, rotation: Rotation | None) -> None:
        """Norms and positions of queries and keys, in place."""
        query, key = (
            part.unflatten(1, (-1, self.head_size)) for part in projected.split(self.sizes, dim=1)[:2]
        )
        if self.query_norm is not None and self.key_norm is not None:
            query.copy_(self.query_norm(query))
            key.copy_(self.key_norm(key))
        if rotation is not None:
            both = projected[:, : sum(self.sizes[:2])].unflatten(1, (-1, self.head_size))
            both.copy_(rotate(both, rotation))

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        return [self.query_key_value, self.output, *self.mlp.linears]


class PreparedParallelLayer(PreparedLayer):
    """x + attention(norm(x)) + mlp(norm'(x))."""

    def __call__(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        attended = self._attended(self.attention_norm(hidden), rotation, attend)
        return self.mlp(self.mlp_norm(hidden), plus=self.output(attended, plus=hidden))


class PreparedPostNormLayer(PreparedLayer):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __call__(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        attended = self._attended(hidden, rotation, attend)
        hidden = self.attention_norm(self.output(attended, plus=hidden))
        return self.mlp_norm(self.mlp(hidden, plus=hidden))


class PreparedSandwichLayer(PreparedLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, layer: SandwichLayer, activation: str, dtype: torch.dtype, *sizes: Any) -> None:
        super().__init__(layer, activation, dtype, *sizes)
        self.attention_output_norm = PreparedNorm(layer.attention_output_norm, dtype)
        self.mlp_output_norm = PreparedNorm(layer.mlp_output_norm, dtype)

    def __call__(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        attended = self._attended(self.attention_norm(hidden), rotation, attend)
        hidden = hidden + self.attention_output_norm(self.output(attended))
        return hidden + self.mlp_output_norm(self.mlp(self.mlp_norm(hidden)))


PREPARED_LAYERS: dict[type[DecoderLayer], type[PreparedLayer]] = {
    DecoderLayer: PreparedLayer,
    ParallelLayer: PreparedParallelLayer,
    PostNormLayer: PreparedPostNormLayer,
    SandwichLayer: PreparedSandwichLayer,
}


def prepare_layer(
    layer: DecoderLayer, activation: str, dtype: torch.dtype, fewest: int, in_tiles: bool = False
) -> PreparedLayer:
    """``layer`` in the form in which generation runs it."""
    return PREPARED_LAYERS[type(layer)](layer, activation, dtype, fewest, in_tiles)


class TokenRotations:
    """Rotary angles of a flat list of tokens, for each layer.

    Args:
        config: the architecture.
        positions: [tokens].
        dtype: of the angles.
    """

    def __init__(self, config: MegatronModelConfig, positions: Tensor, dtype: torch.dtype) -> None:
        found = Rotations(config, positions[None], dtype)
        self._everywhere, self._local = _by_token(found.everywhere), _by_token(found.local)

    def of_layer(self, layer: PreparedLayer) -> Rotation | None:
        """Cosine and sine, each [tokens, 1, rotary_dim]."""
        has_window = (
            self._local is not None and layer.scores is not None and layer.scores.window is not None
        )
        return self._local if has_window else self._everywhere


def _by_token(rotation: Rotation | None) -> Rotation | None:
    return None if rotation is None else (rotation[0][0, 0, :, None], rotation[1][0, 0, :, None])

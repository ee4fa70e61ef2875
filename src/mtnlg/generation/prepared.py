"""A decoder in the form in which generation runs it: one token after the other, weights laid out once.

The model stays as it is; this takes its modules' weights and does what they do, over a flat list of
tokens of all sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.linears import Linear, make_linear
from mtnlg.generation.quantized_linears import make_quantized_linear
from mtnlg.generation.row_counts import filled_up
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.attention import Attention, scaled_dot_product
from mtnlg.model.decoder import Embedding, Head
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS, Mlp
from mtnlg.model.moe import Experts, MixtureOfExperts, run_here
from mtnlg.model.positions import Rotation, rotate, rotation_angles
from mtnlg.model.router import Router
from mtnlg.quantization import QuantizedLinear

# (layer, queries, keys and values [tokens, (heads + 2 · key_value_heads) · head_dim])
# → [tokens, heads · head_dim]
Attend = Callable[[int, Tensor], Tensor]
TORCH_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.ModuleDict)
OWN_MODULES = (
    MegatronLmDecoder,
    Embedding,
    DecoderLayer,
    Attention,
    Mlp,
    MixtureOfExperts,
    Experts,
    Router,
    Head,
    QuantizedLinear,
)
UNGATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


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
        if module is not model and type(module) not in (*TORCH_MODULES, *OWN_MODULES):
            return False
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, Attention) and module.attention_function is not scaled_dot_product:
            return False
        if isinstance(module, MixtureOfExperts) and module.run_experts is not run_here:
            return False
    return True


class PreparedNorm:
    """LayerNorm or RMSNorm in another dtype."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, Tensor) and norm.eps is not None
        self.shape, self.eps = tuple(weight.shape), float(norm.eps)  # type: ignore[arg-type]
        self.weight = weight.to(dtype)
        self.bias = bias.to(dtype) if isinstance(bias, Tensor) else None
        self.is_rms = isinstance(norm, nn.RMSNorm)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., size] → [..., size]"""
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

    def compile_rows(self) -> None:
        """Have kernels made for single rows."""
        if self.gate is not None:
            self.gate.compile_row(self.activation)
            self.up.compile_row(other="times")
        else:
            self.up.compile_row("relu" if self.activation == "squared_relu" else self.activation)
        self.down.compile_row(other="plus")

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        return [linear for linear in (self.up, self.gate, self.down) if linear is not None]


class PreparedExperts:
    """A mixture of experts, each of them prepared (:class:`mtnlg.model.moe.MixtureOfExperts`)."""

    def __init__(self, mixture: MixtureOfExperts, activation: str, dtype: torch.dtype, fewest: int) -> None:
        make = partial(_linear, dtype=dtype)
        experts, self.fewest = mixture.experts, fewest
        gates = [None] * len(experts.up) if experts.gate is None else list(experts.gate.detach())
        self.experts = [
            PreparedMlp(make(up), None if gate is None else make(gate), make(down), activation)
            for up, gate, down in zip(experts.up.detach(), gates, experts.down.detach())
        ]
        shared = mixture.shared
        self.shared = None if shared is None else _prepared_mlp(shared, activation, dtype)
        self.score = _linear(mixture.router.weight.detach().float(), dtype=torch.float32)
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
        if self.shared is not None:
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


class PreparedLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        layer: DecoderLayer,
        activation: str,
        dtype: torch.dtype,
        fewest: int,
        keeps_rows: bool = False,
    ) -> None:
        attention = layer.attention
        self.index, self.head_size = attention.layer_index, attention.head_size
        self.attention_norm = PreparedNorm(layer.attention_norm, dtype)
        self.mlp_norm = PreparedNorm(layer.mlp_norm, dtype)
        three = (attention.query, attention.key, attention.value)
        self.sizes = [linear.out_features for linear in three]
        self.query_key_value = _prepared_linear(three, dtype, keeps_rows)
        self.output = _prepared_linear([attention.output], dtype, keeps_rows)
        self.query_norm = self.key_norm = None
        if attention.query_norm is not None and attention.key_norm is not None:
            self.query_norm = PreparedNorm(attention.query_norm, dtype)
            self.key_norm = PreparedNorm(attention.key_norm, dtype)
        self.mlp: PreparedMlp | PreparedExperts
        if isinstance(layer.mlp, MixtureOfExperts):
            self.mlp = PreparedExperts(layer.mlp, activation, dtype, fewest)
        else:
            self.mlp = _prepared_mlp(layer.mlp, activation, dtype, keeps_rows)

    def __call__(self, hidden: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]"""
        projected = self.query_key_value(self.attention_norm(hidden))
        if rotation is not None or self.query_norm is not None:
            self._turn(projected, rotation)
        hidden = self.output(attend(self.index, projected), plus=hidden)
        return self.mlp(self.mlp_norm(hidden), plus=hidden)

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

    def compile_rows(self) -> None:
        """Have kernels made for single rows."""
        self.query_key_value.compile_row()
        self.output.compile_row(other="plus")
        if isinstance(self.mlp, PreparedMlp):
            self.mlp.compile_rows()

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        return [self.query_key_value, self.output, *self.mlp.linears]


class PreparedDecoder:
    """The whole decoder over a flat list of tokens.

    Args:
        model: as :func:`can_prepare` allows; its embeddings are used where they lie.
        dtype: to compute in.
        fewest: rows that a product should have at least.
        keeps_rows: single rows will have kernels of their own (:meth:`compile_rows`), for which the
            matrices stay in memory as they are too.
    """

    def __init__(
        self, model: MegatronLmDecoder, dtype: torch.dtype, fewest: int, keeps_rows: bool = False
    ) -> None:
        assert model.embedding is not None and model.head is not None
        self.config, self.dtype = model.config, dtype
        activation = model.config.activation_function
        self.tokens = model.embedding.tokens.weight.detach()
        positions = model.embedding.positions
        self.positions = None if positions is None else positions.weight.detach()
        self.layers: list[PreparedLayer] = []
        for layer in model.layers.values():
            assert isinstance(layer, DecoderLayer)
            self.layers.append(PreparedLayer(layer, activation, dtype, fewest, keeps_rows))
        self.norm = PreparedNorm(model.head.norm, dtype)
        self.output = _prepared_linear([model.head.output], dtype, keeps_rows)

    def compile_rows(self) -> None:
        """Have kernels made for single rows; takes seconds the first time.

        Raises:
            Exception: whatever the compiler finds missing.
        """
        for layer in self.layers:
            layer.compile_rows()
        self.output.compile_row()

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings of tokens: [tokens] → [tokens, hidden]"""
        return self.tokens[ids].to(self.dtype)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """After the last layer, before the final norm: [tokens] → [tokens, hidden]"""
        hidden = self.look_up(ids)
        if self.positions is not None:
            hidden = hidden + self.positions[positions].to(self.dtype)
        rotation = None
        if self.config.position_embedding == "rotary":
            cosine, sine = rotation_angles(self.config, positions[None], self.dtype)
            rotation = cosine[0, 0, :, None], sine[0, 0, :, None]  # [tokens, 1, rotary_dim]
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return hidden

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices beside the model's own."""
        linears = [self.output, *(linear for layer in self.layers for linear in layer.linears)]
        return sum(linear.num_bytes for linear in linears)


def _linear(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Linear:
    return make_linear([weight], [bias], dtype, ACTIVATION_FUNCTIONS)


def _prepared_linear(
    modules: Sequence[nn.Linear | QuantizedLinear], dtype: torch.dtype, keeps_rows: bool = False
) -> Linear:
    quantized = [module for module in modules if isinstance(module, QuantizedLinear)]
    if len(quantized) == len(modules):
        return make_quantized_linear(quantized, dtype, ACTIVATION_FUNCTIONS, keeps_rows)
    biases = [None if module.bias is None else module.bias.detach() for module in modules]
    weights = [module.weight.detach() for module in modules]
    return make_linear(weights, biases, dtype, ACTIVATION_FUNCTIONS, keeps_rows)


def _prepared_mlp(mlp: Mlp, activation: str, dtype: torch.dtype, keeps_rows: bool = False) -> PreparedMlp:
    gate = None if mlp.gate is None else _prepared_linear([mlp.gate], dtype, keeps_rows)
    up, down = (_prepared_linear([module], dtype, keeps_rows) for module in (mlp.up, mlp.down))
    return PreparedMlp(up, gate, down, activation)

"""A step in one call: the whole decoder as a list of operations (``kernels/step.cpp``).

A step of a small model is a hundred operations of some ten microseconds. Called one by one, each wakes the
threads anew, and Python and torch look at every argument. The list is made once; a step fills in where its
tokens stand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from mtnlg.generation.linears import Linear
from mtnlg.generation.native import NativeKernel
from mtnlg.generation.paged_attention import PagePool
from mtnlg.generation.prepared import PreparedDecoder
from mtnlg.generation.prepared_blocks import PreparedExperts, PreparedMlp, PreparedNorm
from mtnlg.generation.prepared_layers import PreparedLayer, PreparedParallelLayer, TokenRotations
from mtnlg.generation.quantized_linears import CodesLinear
from mtnlg.generation.step_plan import TokenPlan
from mtnlg.generation.tiled_linear import ACTIVATIONS, IS_BF16, TiledLinear

LANES = 16
MOST_TOKENS = 512  # of one call
NORM, HEAD_NORM, PRODUCT, CALL, TURN, ATTEND = range(6)
OF_RMS, WANTED = 1, 2  # flags of norms
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
KERNEL = NativeKernel("decoder.cpp", "mtnlg_step", [_POINTER, _INTEGER, _POINTER, _INTEGER], ["avx512f"])


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("kind", "activation", "flags")),
        *((name, _POINTER) for name in ("source", "target", "first", "second", "other")),
        ("sizes", _INTEGER * 4),
        ("epsilon", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("tokens", "threads", "table")),
        *((name, _POINTER) for name in ("logits", "new_pages", "new_places", "pages", "lengths", "groups")),
        ("num_groups", _INTEGER),
        *((name, _POINTER) for name in ("cosine", "sine", "wanted")),
        ("num_wanted", _INTEGER),
        ("space", _POINTER),
    )


def native_step(decoder: PreparedDecoder, pools: Mapping[int, PagePool]) -> NativeStep | None:
    """``decoder`` as one list of operations.

    Args:
        decoder: prepared for our own kernels.
        pools: keys and values of each layer.

    Returns:
        ``None`` where the model has parts that the list does not know, or there is no kernel.
    """
    layers = decoder.layers
    known = all(_is_known(layer) and type(pools[layer.index]) is PagePool for layer in layers)
    if not known or not _has_kernel(decoder.output) or not _fits(decoder.norm) or KERNEL.load() is None:
        return None
    return NativeStep(decoder, pools)


def _is_known(layer: PreparedLayer) -> bool:
    if type(layer) not in (PreparedLayer, PreparedParallelLayer) or type(layer.mlp) is not PreparedMlp:
        return False
    if layer.scores is not None or layer.query_scale != 1.0:
        return False
    norms = layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm
    return all(norm is None or _fits(norm) for norm in norms) and all(map(_has_kernel, layer.linears))


def _has_kernel(linear: Linear) -> bool:
    if type(linear) is CodesLinear:
        return linear.order is None
    return type(linear) is TiledLinear and not linear.missing


def _fits(norm: PreparedNorm) -> bool:
    return not norm.is_none and norm.weight.numel() % LANES == 0


class NativeStep:
    """See :func:`native_step`, which checks that the model can be run so.

    Call it with a plan of up to :data:`MOST_TOKENS`; it gives the logits [wanted, vocab] in float32.
    """

    def __init__(self, decoder: PreparedDecoder, pools: Mapping[int, PagePool]) -> None:
        self._decoder, self._pools = decoder, pools  # the list points at what they hold
        self._function, self._held = KERNEL.load(), dict[tuple[str, int], Tensor]()
        self._dtype, self._space = decoder.dtype, 0  # bytes of a row that products want
        self._flags = IS_BF16 * (decoder.dtype == torch.bfloat16)
        output = decoder.output
        self._vocab_size = _outputs(output)
        width = decoder.norm.weight.numel()
        self._hidden, self._normed = self._buffer("hidden", width), self._buffer("normed", width)
        found: list[_Operation] = []
        for layer in decoder.layers:
            self._add_layer(found, layer)
        self._num_layered = len(found)
        found.append(self._norm(decoder.norm, self._normed, WANTED))
        found.append(self._product(output, self._normed, None))
        self._operations = (_Operation * len(found))(*found)
        self._scratch = torch.empty(MOST_TOKENS * self._space, dtype=torch.uint8)

    def __call__(self, plan: TokenPlan) -> Tensor:
        """See the class."""
        logits = self._hidden.new_empty(len(plan.wanted), self._vocab_size)
        num_operations = len(self._operations) if len(logits) else self._num_layered
        self._run(plan, num_operations, logits.data_ptr())
        return logits.float()

    def hidden(self, plan: TokenPlan) -> Tensor:
        """After the final norm: [wanted, hidden]"""
        self._run(plan, self._num_layered + 1, None)
        return self._normed[: len(plan.wanted)].clone()

    def _run(self, plan: TokenPlan, num_operations: int, logits: int | None) -> None:
        """Do so many operations of the list; ``logits`` is a place."""
        count, num_wanted = len(plan.ids), len(plan.wanted)
        self._hidden[:count] = self._decoder.embed(plan.ids, plan.positions, without_adapters=True)
        step = _Step(count, torch.get_num_threads(), plan.pages.shape[1], logits)
        for name in ("new_pages", "new_places", "pages", "lengths", "groups", "wanted"):
            setattr(step, name, getattr(plan, name).data_ptr())
        step.num_groups, step.num_wanted = len(plan.groups), num_wanted
        step.space = self._scratch.data_ptr()
        rotations = TokenRotations(self._decoder.config, plan.positions, self._dtype)
        rotation = rotations.of_layer(self._decoder.layers[0])
        turned = () if rotation is None else (rotation[0].contiguous(), rotation[1].contiguous())
        if turned:
            step.cosine, step.sine = (x.data_ptr() for x in turned)
        self._function(self._operations, num_operations, ctypes.byref(step), self._flags)

    def _add_layer(self, found: list[_Operation], layer: PreparedLayer) -> None:
        is_parallel = type(layer) is PreparedParallelLayer
        hidden, normed = self._hidden, self._normed
        projected = self._buffer("projected", sum(layer.sizes))
        context = self._buffer("context", layer.sizes[0])
        found.append(self._norm(layer.attention_norm, normed))
        beside = self._buffer("beside", hidden.shape[1]) if is_parallel else normed
        if is_parallel:
            found.append(self._norm(layer.mlp_norm, beside))
        found.append(self._product(layer.query_key_value, normed, projected))
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys, _ = layer.sizes
            found.append(self._head_norm(layer.query_norm, projected, 0, queries))
            found.append(self._head_norm(layer.key_norm, projected, queries, keys))
        if self._decoder.config.position_embedding == "rotary":
            found.append(self._turn(layer, projected))
        found.append(self._attend(layer, projected, context))
        found.append(self._product(layer.output, context, hidden, plus=hidden))
        if not is_parallel:
            found.append(self._norm(layer.mlp_norm, normed))
        self._add_mlp(found, layer.mlp, beside)

    def _add_mlp(self, found: list[_Operation], mlp: PreparedMlp | PreparedExperts, source: Tensor) -> None:
        assert isinstance(mlp, PreparedMlp)
        between = self._buffer("between", _outputs(mlp.up))
        if mlp.gate is None:
            found.append(self._product(mlp.up, source, between, mlp.activation))
        else:
            gate = self._buffer("gate", _outputs(mlp.gate))
            found.append(self._product(mlp.gate, source, gate, mlp.activation))
            found.append(self._product(mlp.up, source, between, times=gate))
        found.append(self._product(mlp.down, between, self._hidden, plus=self._hidden))

    def _buffer(self, name: str, size: int) -> Tensor:
        """[tokens, size], zero; layers use it one after the other."""
        key = name, size
        if key not in self._held:  # memory is taken when it is written to
            self._held[key] = torch.zeros(MOST_TOKENS, size, dtype=self._dtype)
        return self._held[key]

    def _norm(self, norm: PreparedNorm, target: Tensor, flags: int = 0) -> _Operation:
        bias = None if norm.bias is None else norm.bias.data_ptr()
        return _Operation(
            NORM,
            0,
            flags + OF_RMS * norm.is_rms,
            *(self._hidden.data_ptr(), target.data_ptr(), norm.weight.data_ptr(), bias),
            sizes=(norm.weight.numel(),),
            epsilon=norm.eps,
        )

    def _head_norm(self, norm: PreparedNorm, projected: Tensor, begin: int, width: int) -> _Operation:
        found, size = self._norm(norm, projected), norm.weight.numel()
        found.kind, found.sizes = HEAD_NORM, (size, projected.shape[1], begin, width // size)
        return found

    def _product(
        self,
        linear: Linear,
        source: Tensor,
        target: Tensor | None,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> _Operation:
        other = times if plus is None else plus
        places = [None if x is None else x.data_ptr() for x in (source, target)]
        behind = None if other is None else other.data_ptr()
        how = ACTIVATIONS[activation], plus is not None, *places
        if isinstance(linear, TiledLinear):
            bias = None if linear.bias is None else linear.bias.data_ptr()
            return _Operation(
                PRODUCT, *how, linear.tiles.data_ptr(), bias, behind, (linear.outputs, linear.words)
            )
        assert isinstance(linear, CodesLinear)
        self._space = max(self._space, linear.space)
        function = ctypes.cast(linear.kernel, _POINTER)
        return _Operation(CALL, *how, ctypes.addressof(linear.matrix), function, behind)

    def _turn(self, layer: PreparedLayer, projected: Tensor) -> _Operation:
        heads, size = sum(layer.sizes[:2]) // layer.head_size, layer.head_size
        sizes = projected.shape[1], heads, size, self._decoder.config.rotary_dim
        return _Operation(TURN, target=projected.data_ptr(), sizes=sizes)

    def _attend(self, layer: PreparedLayer, projected: Tensor, context: Tensor) -> _Operation:
        pool = self._pools[layer.index]
        heads, size, block = pool.keys.shape[1], layer.head_size, pool.values.shape[-1]
        return _Operation(
            ATTEND,
            0,
            0,
            *(x.data_ptr() for x in (projected, context, pool.keys, pool.values)),
            sizes=(heads, layer.sizes[0] // size // heads, size, block),
        )


def _outputs(linear: Linear) -> int:
    assert isinstance(linear, TiledLinear | CodesLinear)
    return linear.outputs

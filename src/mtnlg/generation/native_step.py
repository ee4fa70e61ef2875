"""A step of single tokens in one call: the whole decoder as a list of operations (``kernels/step.cpp``).

A step of a small model is a hundred operations of some ten microseconds. Called one by one, each wakes the
threads anew, and Python and torch look at every argument. The list is made once; a step fills in where its
tokens stand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from mtnlg.generation.few_rows import ACTIVATIONS, IS_BF16, FewRows
from mtnlg.generation.linears import Linear, PackedLinear
from mtnlg.generation.native import NativeKernel
from mtnlg.generation.paged_attention import PagePool
from mtnlg.generation.prepared import PreparedDecoder
from mtnlg.generation.prepared_blocks import PreparedExperts, PreparedMlp, PreparedNorm
from mtnlg.generation.prepared_layers import PreparedLayer, PreparedParallelLayer, TokenRotations
from mtnlg.generation.step_plan import StepPlan

LANES = 16
NORM, PRODUCT, TURN, ATTEND = range(4)
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
KERNEL = NativeKernel("step.cpp", "mtnlg_step", [_POINTER, _INTEGER, _POINTER, _INTEGER], ["avx512f"])


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("kind", "activation", "flags")),
        *((name, _POINTER) for name in ("source", "target", "first", "second", "other")),
        ("sizes", _INTEGER * 4),
        ("epsilon", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("rows", "threads", "table")),
        *((name, _POINTER) for name in ("logits", "new_pages", "new_places", "pages", "lengths")),
        *((name, _POINTER) for name in ("cosine", "sine")),
    )


def native_step(
    decoder: PreparedDecoder, pools: Mapping[int, PagePool], most_rows: int
) -> NativeStep | None:
    """``decoder`` as one list of operations.

    Args:
        decoder: prepared with products of few rows.
        pools: keys and values of each layer.
        most_rows: that a step can have.

    Returns:
        ``None`` where the model has parts that the list does not know, or there is no kernel.
    """
    layers = decoder.layers
    known = all(_is_known(layer) and type(pools[layer.index]) is PagePool for layer in layers)
    if not known or not _has_few(decoder.output) or not _fits(decoder.norm) or KERNEL.load() is None:
        return None
    return NativeStep(decoder, pools, most_rows)


def _is_known(layer: PreparedLayer) -> bool:
    if type(layer) not in (PreparedLayer, PreparedParallelLayer) or type(layer.mlp) is not PreparedMlp:
        return False
    if layer.scores is not None or layer.query_scale != 1.0 or layer.query_norm is not None:
        return False
    norms = layer.attention_norm, layer.mlp_norm
    return all(map(_fits, norms)) and all(map(_has_few, layer.linears))


def _has_few(linear: Linear) -> bool:
    return type(linear) is PackedLinear and linear.few is not None and not linear.few.missing


def _fits(norm: PreparedNorm) -> bool:
    return not norm.is_none and norm.weight.numel() % LANES == 0


class NativeStep:
    """See :func:`native_step`, which checks that the model can be run so.

    Call it with a plan of single tokens, one for each row, in one group; it gives the logits
    [rows, vocab] in float32.
    """

    def __init__(self, decoder: PreparedDecoder, pools: Mapping[int, PagePool], most_rows: int) -> None:
        self._decoder, self._pools = decoder, pools  # the list points at what they hold
        self._function, self._held = KERNEL.load(), list[Tensor]()
        self._rows, self._dtype = most_rows, decoder.dtype
        self._flags = IS_BF16 * (decoder.dtype == torch.bfloat16)
        output = decoder.output
        assert isinstance(output, PackedLinear) and output.few is not None
        self._vocab_size = output.few.outputs
        self._hidden = self._buffer(decoder.norm.weight.numel())
        self._normed, self._beside = torch.empty_like(self._hidden), torch.empty_like(self._hidden)
        found: list[_Operation] = []
        for layer in decoder.layers:
            self._add_layer(found, layer)
        found.append(self._norm(decoder.norm, self._normed))
        found.append(self._product(output, self._normed, None))
        self._operations = (_Operation * len(found))(*found)

    def __call__(self, plan: StepPlan) -> Tensor:
        """See the class."""
        count, group = plan.num_tokens, plan.singles[0]
        ids, positions = plan.ids[:count], plan.positions[:count]
        self._hidden[:count] = self._decoder.embed(ids, positions)
        logits = self._hidden.new_empty(count, self._vocab_size)
        rotations = TokenRotations(self._decoder.config, positions, self._dtype)
        rotation = rotations.of_layer(self._decoder.layers[0])
        turned = () if rotation is None else (rotation[0].contiguous(), rotation[1].contiguous())
        where = [x.contiguous() for x in (plan.pages, plan.places, group.pages, group.lengths)]
        step = _Step(count, torch.get_num_threads(), group.pages.shape[1], logits.data_ptr())
        step.new_pages, step.new_places, step.pages, step.lengths = (x.data_ptr() for x in where)
        if turned:
            step.cosine, step.sine = (x.data_ptr() for x in turned)
        self._function(self._operations, len(self._operations), ctypes.byref(step), self._flags)
        return logits.float()

    def _add_layer(self, found: list[_Operation], layer: PreparedLayer) -> None:
        is_parallel = type(layer) is PreparedParallelLayer
        hidden, normed = self._hidden, self._normed
        projected, context = self._buffer(sum(layer.sizes)), self._buffer(layer.sizes[0])
        found.append(self._norm(layer.attention_norm, normed))
        if is_parallel:
            found.append(self._norm(layer.mlp_norm, self._beside))
        found.append(self._product(layer.query_key_value, normed, projected))
        if self._decoder.config.position_embedding == "rotary":
            found.append(self._turn(layer, projected))
        found.append(self._attend(layer, projected, context))
        found.append(self._product(layer.output, context, hidden, plus=hidden))
        if not is_parallel:
            found.append(self._norm(layer.mlp_norm, normed))
        self._add_mlp(found, layer.mlp, self._beside if is_parallel else normed)

    def _add_mlp(self, found: list[_Operation], mlp: PreparedMlp | PreparedExperts, source: Tensor) -> None:
        assert isinstance(mlp, PreparedMlp)
        between = self._buffer(_few(mlp.up).outputs)
        if mlp.gate is None:
            found.append(self._product(mlp.up, source, between, mlp.activation))
        else:
            gate = self._buffer(_few(mlp.gate).outputs)
            found.append(self._product(mlp.gate, source, gate, mlp.activation))
            found.append(self._product(mlp.up, source, between, times=gate))
        found.append(self._product(mlp.down, between, self._hidden, plus=self._hidden))

    def _buffer(self, size: int) -> Tensor:
        """[rows, size], zero; one for all layers would do, but none is large."""
        self._held.append(torch.zeros(self._rows, size, dtype=self._dtype))
        return self._held[-1]

    def _norm(self, norm: PreparedNorm, target: Tensor) -> _Operation:
        bias = None if norm.bias is None else norm.bias.data_ptr()
        return _Operation(
            NORM,
            0,
            norm.is_rms,
            *(self._hidden.data_ptr(), target.data_ptr(), norm.weight.data_ptr(), bias),
            sizes=(norm.weight.numel(),),
            epsilon=norm.eps,
        )

    def _product(
        self,
        linear: Linear,
        source: Tensor,
        target: Tensor | None,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> _Operation:
        few = _few(linear)
        other = times if plus is None else plus
        return _Operation(
            PRODUCT,
            ACTIVATIONS[activation],
            plus is not None,
            source.data_ptr(),
            None if target is None else target.data_ptr(),
            few.tiles.data_ptr(),
            None if few.bias is None else few.bias.data_ptr(),
            None if other is None else other.data_ptr(),
            (few.outputs, few.words),
        )

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


def _few(linear: Linear) -> FewRows:
    assert isinstance(linear, PackedLinear) and linear.few is not None
    return linear.few

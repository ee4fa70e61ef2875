"""The kernels that a CPU trains fastest with, put into a plain model from outside (docs/performance.md)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from mtnlg.model import DecoderLayer, MegatronLmDecoder, summed_cross_entropy
from mtnlg.model.attention import scaled_dot_product
from mtnlg.parallel.cpu_attention import blockwise_attention
from mtnlg.parallel.cpu_linear import onednn_linear

BLOCK_BYTES = 2**22  # logits that stay in the cache between the passes over them


def use_cpu_kernels(decoder: MegatronLmDecoder, is_divided: bool, runs_once: bool = True) -> None:
    """Replace attention, linear layers and the loss by functions of the same values.

    Args:
        decoder: the model, or one stage of it.
        is_divided: its matrices are split over tensor-parallel ranks, whose linear layers and loss
            (:mod:`mtnlg.parallel.tensor`) use these products already.
        runs_once: whether one backward pass gives all gradients. Where it is split, linear layers stay
            torch's: its own functions compute only the gradient that is asked for, ours both.
    """
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        if layer.attention.attention_function is scaled_dot_product:
            layer.attention.attention_function = blockwise_attention
        for module in () if is_divided or not runs_once else layer.modules():
            if isinstance(module, nn.Linear):
                # The forward of the instance is replaced instead of the module: names stay.
                module.forward = partial(_linear, module)  # type: ignore[method-assign]
    if decoder.head is not None and not is_divided:
        decoder.head.loss_function = partial(
            summed_cross_entropy, product=onednn_linear, block_bytes=BLOCK_BYTES
        )


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    return onednn_linear(inputs, module.weight, module.bias)

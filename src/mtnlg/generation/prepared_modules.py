"""A plain encoder-decoder whose linear layers multiply as prepared ones do (:mod:`.linears`)."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.linears import Linear, fewest_rows
from mtnlg.generation.prepared_blocks import prepared_linear
from mtnlg.generation.row_counts import filled_up
from mtnlg.model import MegatronEncoderDecoder
from mtnlg.quantization.linear import QuantizedLinear


@torch.no_grad()
def with_prepared_linears(model: MegatronEncoderDecoder, dtype: torch.dtype) -> MegatronEncoderDecoder:
    """The same model over the same weights, held once more as products read them best.

    Args:
        model: it is not changed; a later change of its weights is not seen.
        dtype: of its floating-point weights.
    """
    known = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = MegatronEncoderDecoder.__new__(MegatronEncoderDecoder)
    nn.Module.__init__(found)
    for name in ("config", "encoder_positions", "decoder_positions"):
        if name in model.__dict__:  # positions, where the layers have them themselves
            found.__dict__[name] = model.__dict__[name]
    for name, child in model._modules.items():
        found._modules[name] = copy.deepcopy(child, known)
    fewest = fewest_rows(next(model.parameters()).device, dtype, in_tiles=True)
    for module in found.modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            prepared = prepared_linear([module], dtype, in_tiles=True)
            module.forward = partial(_multiply, prepared, fewest)  # type: ignore[method-assign]
    return found.eval()


def _multiply(linear: Linear, fewest: int, inputs: Tensor) -> Tensor:
    """[..., in] → [..., out]"""
    rows = inputs.flatten(0, -2)
    missing = filled_up(len(rows), fewest) - len(rows)
    output = linear(F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows)[: len(rows)]
    return output.unflatten(0, inputs.shape[:-1])

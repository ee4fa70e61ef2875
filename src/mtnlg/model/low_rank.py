"""A trained update beside a frozen linear layer: LoRA, its rank-stabilised form, and DoRA.

LoRA (Hu et al. 2021, arXiv 2106.09685) computes ``W x + s B A x`` with A [rank, in] and B [out, rank];
rank-stabilised (arXiv 2312.03732), only ``s`` differs. DoRA (Liu et al. 2024, arXiv 2402.09353) gives
each row of the sum a trained length: ``m · (W + s B A) x / ‖W + s B A‖``, whose norm counts as a
constant in the backward pass (its section 4.3).

The update is a child of the linear layer, whatever its kind, and the layer's own forward is called
inside: no parameter of the model changes its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHILD = "low_rank"  # the update's name in its linear layer
Product = Callable[[Tensor], Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class LowRankUpdate(nn.Module):
    """The update of one linear layer.

    ``local_down``, ``local_up``, ``local_magnitude``, ``local_base`` (from a parameter, of the update or
    of the layer, to what is computed with) and ``whole_squares`` (from sums of squares over this part of
    each row to those over all of it), ``part`` (from ids of the whole sequence to those that are looked
    up here) and ``whole_weight`` (from rows of a joined matrix to that matrix) are attributes so that a
    layout can put its own in.

    Args:
        in_features: of the linear layer.
        out_features: likewise.
        rank: of the update.
        scale: what the product of the two matrices counts.
        dropout: share of the inputs of the first matrix that is dropped.
        decomposed: DoRA.
        dtype: of the parameters.
        device: likewise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        decomposed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(out_features, rank, dtype=dtype, device=device))
        magnitude = torch.empty(out_features, dtype=dtype, device=device) if decomposed else None
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.dropout = nn.Dropout(dropout)
        self.local_down: Product = _as_it_is
        self.local_up: Product = _as_it_is
        self.local_magnitude: Product = _as_it_is
        self.local_base: Product = _as_it_is
        self.whole_squares: Product = _as_it_is
        self.part: Product = _as_it_is
        self.whole_weight: Product = _as_it_is

    def forward(
        self,
        inputs: Tensor,
        product: Product,
        weight: Callable[[], Tensor],
        bias: Tensor | None = None,
    ) -> Tensor:
        """The layer's output with the update.

        Args:
            inputs: [..., in].
            product: what the layer computes without the update.
            weight: gives the layer's matrix [out, in], where DoRA asks for it.
            bias: [out], which ``product`` adds.

        Returns:
            [..., out]
        """
        is_dropped = self.training and self.dropout.p > 0.0
        dropped = self.dropout(inputs) if is_dropped else inputs
        down, up = self.local_down(self.down), self.local_up(self.up)
        change = F.linear(F.linear(dropped.to(down.dtype), down), up) * self.scale
        output = product(inputs)
        if self.magnitude is None:
            return output + change.to(output.dtype)
        turned = product(dropped) if is_dropped else output
        if bias is not None:
            turned = turned - self.local_base(bias)
        norms = self.row_norms(self.local_base(weight()).detach(), down.detach(), up.detach())
        factor = self.local_magnitude(self.magnitude) / norms
        return output + ((factor - 1.0) * turned + factor * change).to(output.dtype)

    def look_up(self, ids: Tensor, found: Tensor) -> Tensor:
        """Embeddings with the update.

        Args:
            ids: [...].
            found: [..., width], without it.
        """
        down, up = self.local_down(self.down), self.local_up(self.up)
        change = F.linear(F.embedding(self.part(ids), down.t()), up) * self.scale
        return found + change.to(found.dtype)

    def joined(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and a matrix whose product is what the layer computes with the update.

        For losses that multiply by themselves: ``W x + s B A x`` is ``[W B]`` by ``[x, s A x]``.

        Args:
            inputs: [..., in].
            weight: [out, in].

        Returns:
            [..., more] and [out, more]
        """
        is_dropped = self.training and self.dropout.p > 0.0
        dropped = self.dropout(inputs) if is_dropped else inputs
        down, up = self.local_down(self.down), self.local_up(self.up)
        base = self.local_base(weight)
        low = (F.linear(dropped.to(down.dtype), down) * self.scale).to(inputs.dtype)
        if self.magnitude is None:
            columns, matrices = [inputs, low], [base, up]
        else:
            norms = self.row_norms(base.detach(), down.detach(), up.detach())
            factor = (self.local_magnitude(self.magnitude) / norms)[:, None]
            columns, matrices = [inputs, low], [base * factor, up * factor]
            if is_dropped:
                columns, matrices = [inputs, dropped, low], [base, base * (factor - 1.0), up * factor]
        whole = torch.cat([matrix.to(base.dtype) for matrix in matrices], dim=1)
        return torch.cat(columns, dim=-1), self.whole_weight(whole)

    def row_norms(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """‖W + s B A‖ of each row: [out, in], [rank, in], [out, rank] → [out]"""
        total = torch.addmm(weight.to(up.dtype), up, down, alpha=self.scale)
        return self.whole_squares(total.square().sum(dim=1)).sqrt()


def add_low_rank(linear: nn.Module, update: LowRankUpdate) -> None:
    """Let ``linear`` compute with ``update``; whatever its forward is now is called inside."""
    linear.add_module(CHILD, update)
    linear.forward = partial(_with_update, linear, linear.forward)  # type: ignore[method-assign]


def add_low_rank_look_up(tokens: nn.Module, update: LowRankUpdate) -> None:
    """Likewise for a table of embeddings [vocab, width], whose update has ``vocab`` inputs."""
    tokens.add_module(CHILD, update)
    tokens.forward = partial(_look_up_with_update, tokens, tokens.forward)  # type: ignore[method-assign]


def remove_low_rank(linear: nn.Module) -> None:
    """Undo :func:`add_low_rank` or :func:`add_low_rank_look_up`."""
    forward = linear.forward
    own = (_with_update, _look_up_with_update)
    assert isinstance(forward, partial) and forward.func in own, "something was put around it"
    inner = forward.args[1]
    del linear.forward
    if getattr(inner, "__self__", None) is not linear:  # a forward that was there before
        linear.forward = inner  # type: ignore[method-assign]
    delattr(linear, CHILD)


def low_rank_of(module: nn.Module) -> LowRankUpdate | None:
    """The update of a linear layer, if it has one."""
    update = module._modules.get(CHILD)
    return update if isinstance(update, LowRankUpdate) else None


def dense_weight(linear: nn.Module) -> Tensor:
    """The matrix [out, in] of a linear layer, quantized or not."""
    dequantize = getattr(linear, "dequantize", None)
    weight = linear.weight if dequantize is None else dequantize()
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def merged_weight(linear: nn.Module) -> Tensor:
    """The one matrix [out, in] that computes what a linear layer and its update do, in its dtype."""
    update = low_rank_of(linear)
    weight = dense_weight(linear)
    if update is None:
        return weight
    down, up = update.down.float(), update.up.float()
    if isinstance(linear, nn.Embedding):  # [vocab, width]
        return torch.addmm(weight.float(), down.t(), up.t(), alpha=update.scale).to(weight.dtype)
    total = torch.addmm(weight.float(), up, down, alpha=update.scale)
    if update.magnitude is not None:
        total *= (update.magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)


def _with_update(linear: nn.Module, product: Product, inputs: Tensor) -> Tensor:
    update = low_rank_of(linear)
    assert update is not None
    bias = getattr(linear, "bias", None)
    return update(inputs, product, partial(dense_weight, linear), bias)


def _look_up_with_update(tokens: nn.Module, look_up: Product, token_ids: Tensor) -> Tensor:
    update = low_rank_of(tokens)
    assert update is not None
    return update.look_up(token_ids, look_up(token_ids))

"""Which experts a token goes to, and how they are kept equally busy.

Routing: top-k of softmax scores (Shazeer et al. 2017, arXiv 1701.06538) or of sigmoid scores
(DeepSeek-V3, arXiv 2412.19437). Balancing: a loss for each sequence (DeepSeek-V3, equations 17 to 20),
the router z-loss (Zoph et al. 2022, arXiv 2202.08906), or a bias on the choice that follows the load
(Wang et al. 2024, arXiv 2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig

_SMALL = 1e-20  # sigmoid scores may all be zero


class Routing(NamedTuple):
    """Where the tokens of a batch go.

    Args:
        weights: [batch, sequence, experts per token] what each expert's output counts, float32.
        selected: [batch, sequence, experts per token] numbers of the experts.
        counts: [batch, experts] tokens of each sequence that each expert gets.
    """

    weights: Tensor
    selected: Tensor
    counts: Tensor


class Router(nn.Module):
    """Scores every expert for each token, in float32, and takes the best.

    ``logits_function`` is an attribute so that a layout can put its own in.

    Args:
        config: the architecture.
    """

    selection_bias: Tensor | None

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.num_selected = config.num_experts_per_token
        self.score_function = config.router_score_function
        self.normalizes = config.normalize_router_weights
        self.scaling_factor = config.router_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, 0.0, config.init_std)
        has_bias = config.router_load_balancing == "bias"
        self.register_buffer("selection_bias", torch.zeros(config.num_experts) if has_bias else None)
        self.losses = RouterLosses(config)
        self.logits_function: Callable[[Tensor, Tensor], Tensor] = router_logits

    def forward(self, hidden: Tensor) -> Routing:
        """Route hidden states [batch, sequence, hidden]."""
        logits = self.logits_function(hidden, self.weight)  # [batch, sequence, experts]
        scores = logits.softmax(dim=-1) if self.score_function == "softmax" else logits.sigmoid()
        # The bias decides who is chosen and never what a choice counts.
        ranked = scores.detach() if self.selection_bias is None else scores.detach() + self.selection_bias
        selected = ranked.topk(self.num_selected, dim=-1).indices
        weights = scores.gather(-1, selected)
        if self.normalizes:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + _SMALL)
        weights = weights * self.scaling_factor
        counts = count_selected(selected, scores.shape[-1])
        if self.training and torch.is_grad_enabled():
            weights = self.losses.attach(weights, logits, scores, counts)
        return Routing(weights, selected, counts)


def router_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[batch, sequence, hidden] by [experts, hidden] → [batch, sequence, experts], in float32."""
    return F.linear(hidden.float(), weight.float())


def count_selected(selected: Tensor, num_experts: int) -> Tensor:
    """[batch, experts] tokens of each sequence that each expert gets."""
    experts = torch.arange(num_experts, device=selected.device)
    return (selected.flatten(1)[..., None] == experts).sum(dim=1)


class RouterLosses:
    """The losses of one router, and how busy its experts were.

    They are added to what the model learns from without being added to its loss: where the weights
    leave the router their gradient is put in, so that stages without a loss have them too. Each is a
    sum over tokens, like the cross entropy. Balance is measured in each sequence by itself: so the
    number does not depend on which sequences share a batch.

    Attributes:
        factor: what the gradient of the sums is multiplied by (1 / valid tokens of the step).
        share: part of the gradient that this process owes; others that route the same tokens owe the
            rest.
        sum_of_parts: [batch, experts] counts of this part of each sequence → those of the whole.
        totals: since :meth:`reset`: tokens of each expert, then the sums of the balance loss and of
            the z-loss, without their coefficients (float64, [experts + 2]); counted in the backward
            pass, which recomputation does not repeat.

    Args:
        config: the architecture.
    """

    def __init__(self, config: MegatronModelConfig) -> None:
        self.balance_coefficient = config.aux_loss_coefficient
        self.z_coefficient = config.router_z_loss_coefficient
        self.factor: Tensor | float = 1.0
        self.share = 1.0
        self.sum_of_parts: Callable[[Tensor], Tensor] = _as_it_is
        self.totals: Tensor | None = None

    def attach(self, weights: Tensor, logits: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        """The same ``weights``, through which the losses' gradient flows into the router."""
        balance = balance_loss(scores, self.sum_of_parts(counts))
        z_loss = logits.logsumexp(dim=-1).square().sum()
        loss = self.balance_coefficient * balance + self.z_coefficient * z_loss
        sums = torch.stack([balance.detach(), z_loss.detach()]).double()
        statistics = torch.cat([counts.sum(dim=0).double(), sums])
        return _WithLoss.apply(weights, loss, statistics, self)

    def record(self, statistics: Tensor) -> None:
        """Add one micro-batch to the totals."""
        self.totals = statistics if self.totals is None else self.totals + statistics

    def reset(self) -> None:
        """Begin to count anew."""
        self.totals = None


def balance_loss(scores: Tensor, counts: Tensor) -> Tensor:
    """Sum over the tokens of ``experts * Σ_e share of the choices(e) * score(e)``, by sequence.

    It is the number of tokens when all experts are chosen equally often, and more when those are
    chosen more often that score higher.

    Args:
        scores: [batch, sequence or its part, experts], of the router.
        counts: [batch, experts] how often each expert was chosen in the whole of each sequence.
    """
    probabilities = scores / (scores.sum(dim=-1, keepdim=True) + _SMALL)
    shares = counts / counts.sum(dim=-1, keepdim=True)  # no gradient: counting has none
    return (scores.shape[-1] * shares[:, None] * probabilities).sum()


def moved_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """A router's bias after a step: up by ``rate`` for experts below the mean load, down above it.

    Args:
        bias: [experts].
        counts: [experts] tokens that each expert got in the step, over all ranks.
        rate: of the movement.
    """
    return bias + rate * (counts.mean() - counts).sign().to(bias.dtype)


def _as_it_is(counts: Tensor) -> Tensor:
    return counts


class _WithLoss(torch.autograd.Function):
    """Passes ``values`` on and, in the backward pass, gives ``loss`` its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor, statistics: Tensor, losses: RouterLosses) -> Tensor:
        ctx.save_for_backward(statistics)
        ctx.losses = losses
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        (statistics,) = ctx.saved_tensors
        losses: RouterLosses = ctx.losses
        losses.record(statistics)
        factor = torch.as_tensor(losses.factor * losses.share, dtype=torch.float32)
        return output_gradients[0], factor.to(statistics.device), None, None

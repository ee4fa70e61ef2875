"""The routers of one rank through a step: scale of their losses, load of all experts, their biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.moe import has_experts
from mtnlg.model import Router
from mtnlg.model.router import moved_bias
from mtnlg.parallel.expert import mixtures
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage


@dataclass(frozen=True)
class ExpertLoad:
    """How one step used the experts, over all ranks and micro-batches: the same on every rank.

    Args:
        counts: [layers with experts, experts] tokens that each expert got (float64, whole numbers).
        balance_loss: mean over tokens and layers, without its coefficient; 1 is an equal load.
        z_loss: likewise.
    """

    counts: Tensor
    balance_loss: float
    z_loss: float

    @property
    def shares(self) -> list[list[float]]:
        """Load of each expert of each layer, relative to the mean load of its layer."""
        return (self.counts / self.counts.mean(dim=1, keepdim=True).clamp_min(1e-9)).tolist()


def merge_loads(loads: Sequence[ExpertLoad]) -> ExpertLoad:
    """The load of several steps together."""
    tokens = [float(load.counts.sum()) for load in loads]
    total = max(1.0, sum(tokens))
    return ExpertLoad(
        torch.stack([load.counts for load in loads]).sum(dim=0),
        sum(count * load.balance_loss for count, load in zip(tokens, loads)) / total,
        sum(count * load.z_loss for count, load in zip(tokens, loads)) / total,
    )


class Routing:
    """All routers of this rank.

    Args:
        stages: of this rank.
        config: the whole architecture.
        mesh: this rank's place.
    """

    def __init__(self, stages: Iterable[Stage], config: MegatronModelConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.routers: dict[int, Router] = {
            layer: block.router for stage in stages for layer, block in mixtures(stage.decoder).items()
        }
        self._places = [layer for layer in range(config.num_hidden_layers) if has_experts(config, layer)]

    def begin(self, factor: Tensor) -> None:
        """Begin a step whose loss is multiplied by ``factor``."""
        for router in self.routers.values():
            router.losses.factor = factor
            router.losses.reset()

    def load(self) -> ExpertLoad | None:
        """The step's load; every rank calls this. ``None`` in a dense model."""
        if not self._places:
            return None
        assert self.config.num_experts is not None
        num_experts = self.config.num_experts
        shape = (len(self._places), num_experts + 2)
        totals = torch.zeros(shape, dtype=torch.float64, device=self.mesh.device)
        for layer, router in self.routers.items():
            if router.losses.totals is not None:
                totals[self._places.index(layer)] = router.losses.totals
        self.mesh.sum_of_loss(totals)  # tensor-parallel ranks route the same tokens
        counts = totals[:, :num_experts].cpu()
        num_tokens = counts.sum().clamp_min(1.0) / self.config.num_experts_per_token
        balance_loss, z_loss = (totals[:, num_experts:].sum(dim=0).cpu() / num_tokens).tolist()
        return ExpertLoad(counts, balance_loss, z_loss)

    @torch.no_grad()
    def move_biases(self, load: ExpertLoad) -> None:
        """Balance without a loss: after a step, move each router's bias by the step's load."""
        for layer, router in self.routers.items():
            bias = router.selection_bias
            if bias is not None:
                counts = load.counts[self._places.index(layer)].to(bias.device)
                bias.copy_(moved_bias(bias, counts, self.config.bias_update_rate))

    def biases(self) -> dict[str, Tensor]:
        """The biases of this rank's routers by the plain model's names, sharing their memory."""
        return {
            f"layers.{layer}.mlp.router.selection_bias": router.selection_bias
            for layer, router in self.routers.items()
            if router.selection_bias is not None
        }

"""Which layer recomputes what, so that activations keep within a share of what they would take.

Before a layer's first training step its forward pass is run once at each level of recomputation and
the bytes that stay are measured: whatever kernels, layout and shapes there are, the numbers are
theirs. Of all ways to keep within the budget the one that computes least again is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config import ConfigError
from mtnlg.parallel.activation_meter import ActivationMeter

Level = frozenset[str]  # operators that are computed again
FULL: Level = frozenset(["everything"])
LEVELS: tuple[Level, ...] = (
    frozenset(),
    frozenset(["normalization"]),
    frozenset(["normalization", "activation"]),
    frozenset(["attention"]),
    frozenset(["normalization", "attention"]),
    frozenset(["normalization", "activation", "attention"]),
    frozenset(["normalization", "activation", "attention", "linear"]),
    FULL,
)


@dataclass(frozen=True)
class Cost:
    """Of one layer at one level.

    Args:
        kept: bytes that wait for the backward pass.
        again: operations computed again, roughly.
    """

    kept: int
    again: float


class Budget:
    """Divides the levels over the layers of one stage.

    Layers of one kind (with weights of the same shapes) are measured once and share their budget.

    Args:
        layers: of the stage.
        share: of the bytes without recomputation that may be kept, in [0, 1]; 0 keeps the least
            possible.
        agree: the largest of some numbers over all ranks that run the stage. They recompute messages to
            each other: where one measured a few bytes more, all must choose by these.
    """

    def __init__(
        self, layers: Sequence[nn.Module], share: float, agree: Callable[[list[int]], list[int]] = list
    ) -> None:
        self.share = share
        self._agree = agree
        self._kinds: dict[Any, list[nn.Module]] = {}
        for layer in layers:
            self._kinds.setdefault(_kind(layer), []).append(layer)
        self._levels: dict[int, Level] = {}

    def level_of(self, layer: nn.Module, run: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Level:
        """What ``layer`` recomputes.

        Args:
            layer: one of the stage's.
            run: its forward pass, given a level and ``inputs``.
            inputs: of this pass; the first is [batch, sequence, hidden].

        Raises:
            ConfigError: the budget is less than full recomputation keeps.
        """
        if id(layer) not in self._levels:
            costs = measure(layer, run, inputs)
            kept = self._agree([cost.kept for cost in costs])
            costs = [replace(cost, kept=largest) for cost, largest in zip(costs, kept)]
            group = next(group for group in self._kinds.values() if any(one is layer for one in group))
            levels = choose(costs, len(group), self.share)
            for one, level in zip(group, levels):
                self._levels[id(one)] = LEVELS[level]
        return self._levels[id(layer)]


def measure(layer: nn.Module, run: Callable[..., Tensor], inputs: tuple[Any, ...]) -> list[Cost]:
    """What ``layer`` keeps and computes again at each of :data:`LEVELS`."""
    hidden: Tensor = inputs[0]
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    products = 2.0 * hidden.shape[0] * hidden.shape[1] * sum(p.numel() for p in matrices)
    attention = 4.0 * hidden.shape[0] * hidden.shape[1] ** 2 * hidden.shape[2]
    elements = float(hidden.numel())  # norms and activations: operations for each element
    again = {
        "normalization": 20.0 * elements,
        "activation": 40.0 * elements,
        "attention": attention,
        "linear": 0.6 * products,  # all but the last matrix of attention and of the MLP
        "everything": 80.0 * elements + attention + products,
    }
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    costs = []
    for level in LEVELS:
        with torch.random.fork_rng(devices), ActivationMeter() as meter:
            output = run(level, *inputs)
            costs.append(Cost(meter.bytes, sum(again[operator] for operator in level)))
            del output
    return costs


def choose(costs: Sequence[Cost], num_layers: int, share: float) -> list[int]:
    """The level of each of ``num_layers`` equal layers: two levels at most, the least work.

    Raises:
        ConfigError: see :meth:`Budget.level_of`.
    """
    allowed = share * costs[0].kept * num_layers
    least = min(range(len(costs)), key=lambda level: costs[level].kept)
    if share == 0.0:
        return [least] * num_layers
    best: tuple[float, list[int]] | None = None
    for light, lighter in enumerate(costs):
        for heavy, heavier in enumerate(costs):
            for count in range(num_layers + 1):
                kept = count * heavier.kept + (num_layers - count) * lighter.kept
                again = count * heavier.again + (num_layers - count) * lighter.again
                if kept <= allowed and (best is None or again < best[0]):
                    best = again, [heavy] * count + [light] * (num_layers - count)
    if best is None:
        smallest = costs[least].kept / costs[0].kept
        raise ConfigError(
            f"training.activation_memory_budget is {share}: the inputs of the layers alone take "
            f"{smallest:.3f} of all activations. Use at least that, 0 for the least possible, or "
            "activation_recomputation: full."
        )
    return best[1]


def _kind(layer: nn.Module) -> Any:
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())

"""AdamW, and Muon for the matrices of the layers, over parameters in any layout.

Both work on the part of each parameter that this rank holds, so no step goes through DTensor's
dispatch; Muon alone needs whole matrices and gathers them. State is kept by canonical parameter name
and leaves as DTensors of the parameter's own layout, so that a checkpoint knows no layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from mtnlg.config import OptimizerConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model.adapters import is_of_virtual
from mtnlg.parallel.weights import local_slice, whole_tensor
from mtnlg.parallel.working_copy import like
from mtnlg.training.muon import orthogonalize, rate_factor, update_direction


@dataclass
class Group:
    """Parameters that share one rule.

    Args:
        rule: ``adamw`` or ``muon``.
        weight_decay: decoupled weight decay.
        rate: of the learning rate.
        every: gradients are averaged over so many steps before the parameters change.
        names: canonical names.
        parameters: the parameters of these names, DTensors or plain.
        state: per kind of state, one local tensor for each parameter.
    """

    rule: str
    weight_decay: float
    rate: float = 1.0
    every: int = 1
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    state: dict[str, list[Tensor]] = field(default_factory=dict)


class Optimizer:
    """One optimizer over all parameters of this rank.

    Matrices decay; norms, biases and other vectors do not. With ``name: muon`` the matrices inside
    the layers follow Muon and everything else (embeddings, head, vectors) AdamW. Virtual tokens have a
    rate and a rhythm of their own.

    Args:
        named_parameters: canonical names and parameters, float32.
        config: rule and constants.
        adapter: whose virtual tokens are among the parameters, if there are any.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        adapter: AdapterConfig | None = None,
    ) -> None:
        self.config = config
        self.steps = 0
        self.groups = _grouped(named_parameters, config, adapter)
        for group in self.groups:
            kinds = ["exp_avg", "exp_avg_sq"] if group.rule == "adamw" else ["momentum_buffer"]
            kinds += ["gradient_sum"] if group.every > 1 else []
            for kind in kinds:
                group.state[kind] = [torch.zeros_like(local(p.detach())) for p in group.parameters]

    @torch.no_grad()
    def step(self, factor: float, gradient_divisor: float = 1.0) -> None:
        """Update every parameter that has a gradient.

        Args:
            factor: the schedule's factor of the peak rates.
            gradient_divisor: gradients are divided by it (loss scale and clipping in one).
        """
        for group in self.groups:
            divisor = gradient_divisor
            if group.every > 1:
                if not _is_due(group, divisor, self.steps):
                    continue
                divisor = 1.0
            update = _adamw_step if group.rule == "adamw" else _muon_step
            update(group, self.config, factor * group.rate, divisor, self.steps // group.every)
            # A DTensor does not notice what is done to the part of it that this rank holds.
            torch.autograd.graph.increment_version(group.parameters)
        self.steps += 1

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """State by ``NAME.KIND``, each tensor laid out as its parameter and sharing our memory."""
        return {
            f"{name}.{kind}": like(parameter, tensor)
            for group in self.groups
            for kind, tensors in group.state.items()
            for name, parameter, tensor in zip(group.names, group.parameters, tensors)
        }


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _is_due(group: Group, gradient_divisor: float, steps: int) -> bool:
    """Add this step's gradients to the sums; when enough are there, leave their means as gradients."""
    is_due = (steps + 1) % group.every == 0
    for parameter, total in zip(group.parameters, group.state["gradient_sum"]):
        gradient = _gradient(parameter)
        if gradient is None:
            continue
        total.add_(gradient, alpha=1.0 / (gradient_divisor * group.every))
        if is_due:
            gradient.copy_(total)
            total.zero_()
    return is_due


def _grouped(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    adapter: AdapterConfig | None = None,
) -> list[Group]:
    groups = {
        "muon": Group("muon", config.weight_decay),
        "decay": Group("adamw", config.weight_decay),
        "plain": Group("adamw", 0.0),
    }
    if adapter is not None:
        rhythm = (adapter.lr_multiplier, adapter.update_every_n_steps)
        groups["virtual"] = Group("adamw", config.weight_decay, *rhythm)
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        kind = "decay" if parameter.ndim >= 2 else "plain"
        is_table = name.endswith(
            "positions.buckets.weight"
        )  # a number for each head, which nothing multiplies
        if config.name == "muon" and name.startswith("layers.") and parameter.ndim >= 2 and not is_table:
            kind = "muon"
        if adapter is not None and is_of_virtual(name):
            kind = "virtual"
        groups[kind].names.append(name)
        groups[kind].parameters.append(parameter)
    return [group for group in groups.values() if group.names]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else local(parameter.grad)


def _adamw_step(
    group: Group, config: OptimizerConfig, factor: float, gradient_divisor: float, steps: int
) -> None:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in one fused kernel."""
    gradients = [_gradient(parameter) for parameter in group.parameters]
    present = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.numel()]
    present_gradients = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    if not present:
        return
    parameters = [local(group.parameters[i]).detach() for i in present]
    device = parameters[0].device
    fused = device.type in ("cpu", "cuda")
    if not fused and gradient_divisor != 1.0:
        torch._foreach_div_(present_gradients, gradient_divisor)
    adamw(
        parameters,
        present_gradients,
        [group.state["exp_avg"][i] for i in present],
        [group.state["exp_avg_sq"][i] for i in present],
        [],
        list(torch.full((len(present),), float(steps), device=device if fused else "cpu").unbind()),
        fused=fused,
        foreach=not fused,
        # The fused kernel divides as it reads: clipping costs no pass over the gradients of its own.
        grad_scale=torch.full((), gradient_divisor, device=device) if fused else None,
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        lr=config.learning_rate * factor,
        weight_decay=group.weight_decay,
        eps=config.epsilon,
        maximize=False,
    )


def _muon_step(
    group: Group, config: OptimizerConfig, factor: float, gradient_divisor: float, steps: int
) -> None:
    rate = config.muon_learning_rate * factor
    for parameter, buffer in zip(group.parameters, group.state["momentum_buffer"]):
        gradient = _gradient(parameter)
        if gradient is None:
            continue
        direction = update_direction(gradient / gradient_divisor, buffer, config.muon_momentum)
        update = local_slice(orthogonalize(whole_tensor(like(parameter, direction))), parameter)
        rows, columns = parameter.shape[-2:]
        values = local(parameter).detach()
        values.mul_(1.0 - rate * group.weight_decay)
        values.add_(update.to(values.device), alpha=-rate * rate_factor(rows, columns))

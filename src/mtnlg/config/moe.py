"""Mixture of experts in a model's config: which layers have experts, their sizes, their rules."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

SCORE_FUNCTIONS = ("softmax", "sigmoid")
LOAD_BALANCINGS = ("auxiliary_loss", "bias", "none")
AUX_LOSS_COEFFICIENT = 0.01  # Fedus et al. 2021, arXiv 2101.03961
BIAS_UPDATE_RATE = 0.001  # Wang et al. 2024, arXiv 2408.15664

# What says something about experts only, and so nothing without them.
EXPERT_FIELDS = (
    "num_experts_per_token",
    "moe_intermediate_size",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "num_dense_layers_first",
    "moe_layer_interval",
    "router_score_function",
    "normalize_router_weights",
    "router_scaling_factor",
    "router_load_balancing",
    "router_aux_loss_coefficient",
    "router_z_loss_coefficient",
    "router_bias_update_rate",
)


def has_experts(config: MegatronModelConfig, layer: int) -> bool:
    """Whether layer ``layer`` has experts instead of one MLP."""
    if config.num_experts is None or layer < config.num_dense_layers_first:
        return False
    return (layer + 1) % config.moe_layer_interval == 0


def mlp_weights(config: MegatronModelConfig, layer: int, active: bool = False) -> int:
    """Entries of the MLP's or the experts' and the router's matrices in one layer.

    Args:
        config: the architecture.
        layer: its number.
        active: count only the experts that one token goes through.
    """
    matrix_pairs = config.hidden_size * (3 if config.is_gated else 2)
    if not has_experts(config, layer):
        return matrix_pairs * config.ffn_size
    assert config.num_experts is not None
    routed = config.num_experts_per_token if active else config.num_experts
    experts = matrix_pairs * (routed * config.expert_ffn_size + config.shared_expert_size)
    gates = config.num_experts + config.shared_expert_gate
    return experts + config.hidden_size * gates


def expert_problems(config: MegatronModelConfig) -> list[str]:
    """Every reason why the fields about experts do not fit together."""
    if config.num_experts is None:
        defaults = {item.name: item.default for item in fields(config) if item.default is not MISSING}
        return [
            f"{name} is {getattr(config, name)!r}: it has no effect without num_experts; give that too, "
            f"or leave {name} out."
            for name in EXPERT_FIELDS
            if getattr(config, name) != defaults[name]
        ]
    return _range_problems(config) + _combination_problems(config)


def _range_problems(config: MegatronModelConfig) -> list[str]:
    at_least = dict(
        num_experts=1,
        num_experts_per_token=1,
        moe_intermediate_size=1,
        num_shared_experts=0,
        shared_expert_intermediate_size=1,
        num_dense_layers_first=0,
        moe_layer_interval=1,
        router_aux_loss_coefficient=0,
        router_z_loss_coefficient=0,
    )
    problems = [
        f"{name} is {getattr(config, name)}: it must be at least {least}."
        for name, least in at_least.items()
        if getattr(config, name) is not None and getattr(config, name) < least
    ]
    for name in ("router_scaling_factor", "router_bias_update_rate"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            problems.append(f"{name} is {value}: it must be greater than 0.")
    for name, choices in (
        ("router_score_function", SCORE_FUNCTIONS),
        ("router_load_balancing", LOAD_BALANCINGS),
    ):
        if getattr(config, name) not in choices:
            problems.append(f"{name} is {getattr(config, name)!r}: choose one of {', '.join(choices)}.")
    return problems


def _combination_problems(config: MegatronModelConfig) -> list[str]:
    problems = []
    experts, per_token = config.num_experts or 0, config.num_experts_per_token
    if per_token > experts:
        problems.append(f"num_experts_per_token is {per_token}: there are only {experts} experts.")
    if config.mlp_bias:
        problems.append("mlp_bias is true: experts have no biases; set mlp_bias: false.")
    first, interval = config.num_dense_layers_first, config.moe_layer_interval
    if interval >= 1 and not any(has_experts(config, layer) for layer in range(config.num_hidden_layers)):
        problems.append(
            f"num_dense_layers_first is {first} and moe_layer_interval is {interval}: none of the "
            f"{config.num_hidden_layers} layers would have experts."
        )
    if not config.num_shared_experts:
        problems += [
            f"{name} is {getattr(config, name)}: there are no shared experts; set num_shared_experts: 1."
            for name in ("shared_expert_intermediate_size", "shared_expert_gate")
            if getattr(config, name)
        ]
    balancing = config.router_load_balancing
    if balancing == "none" and config.router_aux_loss_coefficient:
        problems.append(
            f"router_aux_loss_coefficient is {config.router_aux_loss_coefficient}: with "
            "router_load_balancing: none there is no such loss; leave one of them out."
        )
    if balancing != "bias" and config.router_bias_update_rate is not None:
        problems.append(
            f"router_bias_update_rate is {config.router_bias_update_rate}: there is a bias only with "
            "router_load_balancing: bias; set that, or leave the rate out."
        )
    return problems

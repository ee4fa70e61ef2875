"""Megatron's options and tensors of mixtures of experts, and ours.

In a distributed checkpoint the matrices of all experts of a layer are one tensor [experts, out, in], the
gate's rows before the up projection's, whichever of Megatron's modules computed them.
"""

from __future__ import annotations

from typing import Any

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.moe import has_experts

# Options under which experts are others than ours, and the values under which they are not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "moe_expert_capacity_factor": (None,),
    "moe_router_num_groups": (None, 1),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_use_legacy_grouped_gemm": (False,),
    "moe_router_load_balancing_type": ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
}
PARTS = {
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.selection_bias": "mlp.router.expert_bias",
    "mlp.experts.down": "mlp.experts.experts.linear_fc2.weight",
    "mlp.shared.down.weight": "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_gate.weight": "mlp.shared_experts.gate_weight",
}
# (gate, up) of ours → the tensor of theirs that holds both.
FIRSTS = {
    ("mlp.experts.gate", "mlp.experts.up"): "mlp.experts.experts.linear_fc1.weight",
    ("mlp.shared.gate.weight", "mlp.shared.up.weight"): "mlp.shared_experts.linear_fc1.weight",
}
NORM, FUSED_NORM = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"


def is_mixture(given: dict[str, Any]) -> bool:
    """Whether the options are of a model with experts."""
    count = given.get("num_experts")
    return bool(count) and count != 1 and count != [1]


def experts_of_options(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Our fields for Megatron's options; empty without experts.

    Raises:
        CheckpointError: an option makes experts that we do not compute.
    """
    if not is_mixture(given):
        return {}
    wrong = [
        f"{name} is {given[name]!r}"
        for name, allowed in _MUST_BE.items()
        if given.get(name) not in (*allowed, None)
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: Megatron's options: {'; '.join(wrong)}: such experts cannot be read."
        )
    width = given.get("moe_ffn_hidden_size") or given.get("ffn_hidden_size")
    shared = given.get("moe_shared_expert_intermediate_size")
    per_token = int(given.get("moe_router_topk") or 2)
    is_sigmoid = given.get("moe_router_score_function") == "sigmoid"
    has_bias = bool(given.get("moe_router_enable_expert_bias"))
    is_none = given.get("moe_router_load_balancing_type") == "none"
    first, interval = _layers(given, where)
    fields = dict(
        num_experts=int(given["num_experts"]),
        num_experts_per_token=per_token,
        moe_intermediate_size=width,
        num_shared_experts=1 if shared else 0,
        shared_expert_intermediate_size=shared or None,
        shared_expert_gate=bool(shared and given.get("moe_shared_expert_gate")),
        num_dense_layers_first=first,
        moe_layer_interval=interval,
        router_score_function="sigmoid" if is_sigmoid else "softmax",
        normalize_router_weights=per_token > 1 if is_sigmoid else not given.get("moe_router_pre_softmax"),
        router_scaling_factor=float(given.get("moe_router_topk_scaling_factor") or 1.0),
        router_load_balancing="bias" if has_bias else "none" if is_none else "auxiliary_loss",
        router_z_loss_coefficient=float(given.get("moe_z_loss_coeff") or 0.0),
    )
    if not is_none:
        fields["router_aux_loss_coefficient"] = float(given.get("moe_aux_loss_coeff") or 0.0)
    if has_bias and given.get("moe_router_bias_update_rate"):
        fields["router_bias_update_rate"] = float(given["moe_router_bias_update_rate"])
    return fields


def _layers(given: dict[str, Any], where: str) -> tuple[int, int]:
    """(first layers without experts, every so many-th of the others has them)."""
    frequency, count = given.get("moe_layer_freq") or 1, int(given["num_layers"])
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(count)]
    pattern = [bool(one) for one in frequency]
    for first in range(count):
        for interval in range(1, count + 1):
            if pattern == [layer >= first and (layer + 1) % interval == 0 for layer in range(count)]:
                return first, interval
    raise CheckpointError(
        f"{where}: Megatron's moe_layer_freq is {given.get('moe_layer_freq')!r}: experts can be in every "
        "so many-th layer after the first ones, counted from their end."
    )


def options_of_experts(config: MegatronModelConfig) -> dict[str, Any]:
    """The inverse of :func:`experts_of_options`."""
    if config.num_experts is None:
        return dict(num_experts=None)
    pattern = [int(has_experts(config, layer)) for layer in range(config.num_hidden_layers)]
    balancing = config.router_load_balancing
    return dict(
        num_experts=config.num_experts,
        moe_ffn_hidden_size=config.expert_ffn_size,
        moe_layer_freq=1 if all(pattern) else pattern,
        moe_router_topk=config.num_experts_per_token,
        moe_router_score_function=config.router_score_function,
        moe_router_pre_softmax=config.router_score_function == "softmax"
        and not config.normalize_router_weights,
        moe_router_topk_scaling_factor=config.router_scaling_factor,
        moe_router_enable_expert_bias=balancing == "bias",
        moe_router_bias_update_rate=config.router_bias_update_rate or 1e-3,
        moe_router_load_balancing_type="none" if balancing == "none" else "seq_aux_loss",
        moe_aux_loss_coeff=config.router_aux_loss_coefficient or 0.0,
        moe_z_loss_coeff=config.router_z_loss_coefficient or None,
        moe_shared_expert_intermediate_size=config.shared_expert_size or None,
        moe_shared_expert_gate=config.shared_expert_gate,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
    )


def expert_obstacles(config: MegatronModelConfig) -> list[str]:
    """What of the experts Megatron does not compute."""
    if config.num_experts is None:
        return []
    problems = []
    is_sigmoid, per_token = config.router_score_function == "sigmoid", config.num_experts_per_token
    if is_sigmoid and config.normalize_router_weights != (per_token > 1):
        problems.append(
            f"normalize_router_weights is {config.normalize_router_weights}: sigmoid scores of more than "
            "one expert are normalized there, and of one not."
        )
    if not is_sigmoid and per_token == 1 and config.normalize_router_weights:
        problems.append("normalize_router_weights is True: of one expert, softmax scores are not there.")
    if not is_sigmoid and config.router_load_balancing == "bias":
        problems.append("router_load_balancing is 'bias': there only with router_score_function: sigmoid.")
    return problems


def is_uniform(config: MegatronModelConfig) -> bool:
    """Whether all layers are alike, so that a checkpoint holds them as one tensor."""
    kinds = {has_experts(config, layer) for layer in range(config.num_hidden_layers)}
    return len(kinds) == 1

"""Hugging Face families with experts: Mixtral, Qwen3-MoE, and GLM-4-MoE (shared experts and a bias)."""

from __future__ import annotations

from typing import Any

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.architecture import LLAMA_DEFAULTS, LLAMA_FIELDS, Architecture

_ROUTING = dict(num_experts_per_token="num_experts_per_tok")
_MIXTRAL_FIELDS = {key: value for key, value in LLAMA_FIELDS.items() if key != "intermediate_size"}

_MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    fields=_MIXTRAL_FIELDS
    | _ROUTING
    | dict(
        num_experts="num_local_experts",
        moe_intermediate_size="intermediate_size",
        router_aux_loss_coefficient="router_aux_loss_coef",
    ),
    defaults=LLAMA_DEFAULTS
    | dict(
        num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=1e6, num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001,
    ),
    unsupported=dict(sliding_window=(None,)),
)  # fmt: skip
_QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    fields=LLAMA_FIELDS
    | _ROUTING
    | dict(
        num_experts="num_experts",
        moe_intermediate_size="moe_intermediate_size",
        normalize_router_weights="norm_topk_prob",
        moe_layer_interval="decoder_sparse_step",
        router_aux_loss_coefficient="router_aux_loss_coef",
    ),
    defaults=LLAMA_DEFAULTS
    | dict(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4,
        intermediate_size=6144, max_position_embeddings=32768, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=False, decoder_sparse_step=1, router_aux_loss_coef=0.001,
        mlp_only_layers=None,
    ),
    unsupported=dict(use_sliding_window=(False,)),
)  # fmt: skip
_GLM4_MOE = Architecture(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    fields=LLAMA_FIELDS
    | _ROUTING
    | dict(
        num_experts="n_routed_experts",
        moe_intermediate_size="moe_intermediate_size",
        num_shared_experts="n_shared_experts",
        num_dense_layers_first="first_k_dense_replace",
        normalize_router_weights="norm_topk_prob",
        router_scaling_factor="routed_scaling_factor",
        qk_normalization="use_qk_norm",
    ),
    defaults=LLAMA_DEFAULTS
    | dict(
        vocab_size=151552, num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8,
        intermediate_size=10944, max_position_embeddings=131072, rms_norm_eps=1e-5,
        moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1, n_routed_experts=128,
        routed_scaling_factor=1.0, first_k_dense_replace=1, norm_topk_prob=True, use_qk_norm=False,
        partial_rotary_factor=0.5,
    ),
    unsupported=dict(
        n_group=(1,), topk_group=(1,), num_nextn_predict_layers=(0,), num_mtp_layers=(0,)
    ),
)  # fmt: skip

MOE_FAMILIES = {family.model_type: family for family in (_MIXTRAL, _QWEN3_MOE, _GLM4_MOE)}


def moe_requirements(model_type: str, config: MegatronModelConfig) -> dict[str, Any]:
    """Field → the only value under which the family computes the same."""
    required: dict[str, Any] = dict(
        mlp_bias=False,
        rotary_percent=1.0,
        qk_normalization=model_type == "qwen3_moe",
        moe_layer_interval=1,
    )
    if model_type == "glm4_moe":
        required |= dict(
            qk_normalization=config.qk_normalization,
            attention_output_bias=False,
            router_score_function="sigmoid",
            router_load_balancing="bias",
            num_shared_experts=max(1, config.num_shared_experts),
        )
        return required
    balancing = config.router_load_balancing
    required |= dict(
        num_shared_experts=0,
        router_score_function="softmax",
        router_scaling_factor=1.0,
        router_load_balancing="auxiliary_loss" if balancing == "bias" else balancing,
    )
    if model_type == "mixtral":
        plain = dict(normalize_router_weights=True, num_dense_layers_first=0)
        return required | plain | dict(attention_bias=False, attention_output_bias=False)
    return required | dict(moe_layer_interval=config.moe_layer_interval)


def moe_to_saved(model_type: str, config: MegatronModelConfig) -> dict[str, Any]:
    """What ``config.json`` holds besides the family's fields."""
    if model_type == "qwen3_moe":
        return dict(mlp_only_layers=list(range(config.num_dense_layers_first)))
    if model_type == "glm4_moe":
        rope = dict(rope_theta=config.rotary_base, rope_type="default", partial_rotary_factor=1.0)
        groups = dict(n_group=1, topk_group=1, num_nextn_predict_layers=0)
        return groups | dict(rope_parameters=rope, partial_rotary_factor=1.0)
    return {}


def moe_from_saved(model_type: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our fields for a parsed ``config.json``, besides the family's fields.

    Raises:
        CheckpointError: layers without experts lie among those with them.
    """
    if model_type == "glm4_moe":
        return dict(
            qk_normalization=values["use_qk_norm"],
            attention_output_bias=False,
            router_score_function="sigmoid",
            router_load_balancing="bias",
        )
    if model_type == "mixtral":
        return {}
    dense = sorted(values["mlp_only_layers"] or [])
    if dense != list(range(len(dense))):
        raise CheckpointError(
            f"{where}: mlp_only_layers is {dense}: only the first layers can be without experts."
        )
    return dict(
        qk_normalization=True,
        num_dense_layers_first=len(dense),
        num_experts=values.get("num_local_experts", values["num_experts"]),  # as transformers 5 has it
    )


def moe_prefix(model_type: str) -> str:
    """Where in a layer the family's files keep the experts."""
    return "block_sparse_moe" if model_type == "mixtral" else "mlp"


def expert_matrices(model_type: str) -> dict[str, str]:
    """Our name of each matrix of an expert → the one in the family's files."""
    if model_type == "mixtral":
        return dict(gate="w1", up="w3", down="w2")
    return dict(gate="gate_proj", up="up_proj", down="down_proj")

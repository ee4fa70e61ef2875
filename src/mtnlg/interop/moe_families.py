"""Hugging Face families of decoders with experts: Mixtral, Qwen2- and Qwen3-MoE, and GLM-4-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.architecture import (
    LLAMA_DEFAULTS,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    LLAMA_SETTINGS,
    NO_BIASES,
    Architecture,
)
from mtnlg.interop.settings import GATED_ACTIVATIONS, Activation, Rotary, Values, Window


@dataclass(frozen=True)
class DenseLayers:
    """Layers without experts, named one by one."""

    names: tuple[str, ...] = ("num_dense_layers_first",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        dense = sorted(values["mlp_only_layers"] or [])
        if dense != list(range(len(dense))):
            raise CheckpointError(
                f"{where}: mlp_only_layers is {dense}: only the first layers can be without experts."
            )
        return dict(num_dense_layers_first=len(dense))

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return dict(mlp_only_layers=list(range(config.num_dense_layers_first)))

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return []


@dataclass(frozen=True)
class NoBalancingBias:
    """Experts are balanced by a loss or not at all; files do not say which."""

    names: tuple[str, ...] = ("router_load_balancing",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return {}

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return {}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        if config.router_load_balancing != "bias":
            return []
        return ["router_load_balancing is 'bias': it must be 'auxiliary_loss' or 'none'."]


@dataclass(frozen=True)
class SharedExperts:
    """Experts that every token goes through, at least one."""

    names: tuple[str, ...] = ("num_shared_experts",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return dict(num_shared_experts=values["n_shared_experts"])

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        groups = dict(n_group=1, topk_group=1, num_nextn_predict_layers=0)
        return groups | dict(n_shared_experts=config.num_shared_experts)

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`~mtnlg.interop.settings.Setting`."""
        return [] if config.num_shared_experts else ["num_shared_experts is 0: it must be at least 1."]


_ROUTING = dict(num_experts_per_token="num_experts_per_tok")
_MIXTRAL_FIELDS = {key: value for key, value in LLAMA_FIELDS.items() if key != "intermediate_size"}
_SOFTMAX: dict[str, Any] = dict(router_score_function="softmax", router_scaling_factor=1.0)

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
        num_experts_per_tok=2, num_local_experts=8, router_aux_loss_coef=0.001,
    ),
    unsupported={},
    fixed=LLAMA_FIXED | NO_BIASES | _SOFTMAX | dict(normalize_router_weights=True),
    settings=(
        Activation("hidden_act", GATED_ACTIVATIONS),
        Rotary(base=1e6),
        Window(),
        NoBalancingBias(),
    ),
)  # fmt: skip
_QWEN_MOE_FIELDS = LLAMA_FIELDS | _ROUTING | dict(
    num_experts="num_experts",
    moe_intermediate_size="moe_intermediate_size",
    normalize_router_weights="norm_topk_prob",
    moe_layer_interval="decoder_sparse_step",
    router_aux_loss_coefficient="router_aux_loss_coef",
)  # fmt: skip
_QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    fields=_QWEN_MOE_FIELDS | dict(attention_bias="attention_bias"),
    defaults=LLAMA_DEFAULTS
    | dict(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_key_value_heads=4,
        intermediate_size=6144, max_position_embeddings=32768, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=False, decoder_sparse_step=1, router_aux_loss_coef=0.001,
        mlp_only_layers=None, sliding_window=4096,
    ),
    unsupported={},
    fixed=LLAMA_FIXED
    | _SOFTMAX
    | dict(attention_output_bias=None, mlp_bias=False, qk_normalization=True),
    settings=(*LLAMA_SETTINGS, Window(has_switch=True), DenseLayers(), NoBalancingBias()),
    aliases=dict(num_local_experts="num_experts"),  # as transformers 5 has it
)  # fmt: skip
_QWEN2_MOE = Architecture(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    fields=_QWEN_MOE_FIELDS
    | dict(
        attention_bias="qkv_bias",
        shared_expert_intermediate_size="shared_expert_intermediate_size",
    ),
    defaults=LLAMA_DEFAULTS
    | dict(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, intermediate_size=5632, max_position_embeddings=32768,
        moe_intermediate_size=1408, num_experts=60, num_experts_per_tok=4, norm_topk_prob=False,
        decoder_sparse_step=1, router_aux_loss_coef=0.001, mlp_only_layers=None, qkv_bias=True,
        shared_expert_intermediate_size=5632,
    ),
    unsupported=dict(use_sliding_window=(False,)),
    fixed=LLAMA_FIXED
    | _SOFTMAX
    | dict(attention_output_bias=False, mlp_bias=False, num_shared_experts=1, shared_expert_gate=True),
    settings=(*LLAMA_SETTINGS, DenseLayers(), NoBalancingBias()),
    aliases=dict(num_local_experts="num_experts"),
)  # fmt: skip
_GLM4_MOE = Architecture(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    fields=LLAMA_FIELDS
    | _ROUTING
    | dict(
        num_experts="n_routed_experts",
        moe_intermediate_size="moe_intermediate_size",
        num_dense_layers_first="first_k_dense_replace",
        normalize_router_weights="norm_topk_prob",
        router_scaling_factor="routed_scaling_factor",
        qk_normalization="use_qk_norm",
        attention_bias="attention_bias",
    ),
    defaults=LLAMA_DEFAULTS
    | dict(
        vocab_size=151552, num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8,
        intermediate_size=10944, max_position_embeddings=131072, rms_norm_eps=1e-5,
        moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1, n_routed_experts=128,
        routed_scaling_factor=1.0, first_k_dense_replace=1, norm_topk_prob=True, use_qk_norm=False,
    ),
    unsupported=dict(
        n_group=(1,), topk_group=(1,), num_nextn_predict_layers=(0,), num_mtp_layers=(0,)
    ),
    fixed=LLAMA_FIXED
    | dict(
        attention_output_bias=False,
        mlp_bias=False,
        router_score_function="sigmoid",
        router_load_balancing="bias",
    ),
    settings=(
        Activation("hidden_act", GATED_ACTIVATIONS),
        Rotary(percent=0.5, is_partial=True),
        SharedExperts(),
    ),
)  # fmt: skip

MOE_FAMILIES = {family.model_type: family for family in (_MIXTRAL, _QWEN3_MOE, _GLM4_MOE, _QWEN2_MOE)}

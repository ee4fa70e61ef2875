"""A model of ours as ``megatron-core``'s GPTModel, with the same weights: another program's opinion."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tests.parallel.workers import SEED, make_batches, mesh_of, whole
from torch import Tensor, nn

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.interop.megatron_experts import options_of_experts
from mtnlg.parallel import Mesh, ParallelModel, lay_out
from mtnlg.tokens.batch import IGNORED_LABEL, Batch


def beside_megatron(model_fields: dict[str, Any], tensor_parallel_size: int) -> dict[str, float]:
    """One step of both programs, each divided over ``tensor_parallel_size`` ranks, from the same weights.

    Returns:
        Relative differences of the loss and of the gradients, and how many parameters were compared.
    """
    config = MegatronModelConfig(**model_fields)
    layout: dict[str, Any] = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": 1}
    alone = Mesh(LayoutConfig(**layout), torch.device("cpu"))
    model = lay_out(config, mesh_of(layout) if tensor_parallel_size > 1 else alone, SEED)
    weights = {name: whole(item.detach()).clone() for name, item in model.named_parameters()}
    (batches,) = make_batches(config.vocab_size, 3, 8, False, 1, 1)
    loss, gradients = _our_step(model, batches[0])
    with _megatron_of_size(tensor_parallel_size) as rank:
        theirs = build(config)
        parts = {
            name: part_of_rank(name, item, config, rank, tensor_parallel_size)
            for name, item in in_megatron_order(weights, config).items()
        }
        missing = theirs.load_state_dict(parts, strict=False)
        assert not missing.unexpected_keys and all("_extra_state" in key for key in missing.missing_keys)
        their_loss = _their_step(theirs, batches[0])
        largest = max(gradient.abs().max() for gradient in gradients.values())
        worst, compared = 0.0, 0
        expected = in_megatron_order(gradients, config)
        for name, parameter in theirs.named_parameters():
            ours = part_of_rank(name, expected[name], config, rank, tensor_parallel_size)
            assert parameter.grad is not None
            worst = max(worst, float((parameter.grad - ours).abs().max() / largest))
            compared += 1
    return {
        "loss": abs(loss - their_loss) / abs(their_loss),
        "gradient": worst,
        "compared": compared,
        "expected": len(expected),
    }


def in_megatron_order(ours: dict[str, Tensor], config: MegatronModelConfig) -> dict[str, Tensor]:
    """Weights or gradients of the plain model under Megatron's names and in its order of rows.

    Megatron keeps queries, keys and values in one matrix, group after group: the queries that share a
    key head, then that key head, then its value head. Gate and up projection are one matrix too, the gate
    first. A norm in front of a block belongs to the layer.
    """
    names = {
        "embedding.tokens.weight": "embedding.word_embeddings.weight",
        "embedding.positions.weight": "embedding.position_embeddings.weight",
        "head.output.weight": "output_layer.weight",
        "head.norm.weight": "decoder.final_layernorm.weight",
        "head.norm.bias": "decoder.final_layernorm.bias",
    }
    theirs = {new: ours[old] for old, new in names.items() if old in ours}
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        mine = {name.removeprefix(prefix): ours[name] for name in ours if name.startswith(prefix)}
        for name, item in _layer(mine, config).items():
            theirs[f"decoder.{prefix}{name}"] = item
    return theirs


def _layer(ours: dict[str, Tensor], config: MegatronModelConfig) -> dict[str, Tensor]:
    theirs = {}
    for kind in ("weight", "bias"):
        if f"attention_norm.{kind}" in ours:
            theirs[f"input_layernorm.{kind}"] = ours[f"attention_norm.{kind}"]
            theirs[f"pre_mlp_layernorm.{kind}"] = ours[f"mlp_norm.{kind}"]
        if f"attention.query.{kind}" in ours:
            groups = [
                ours[f"attention.{name}.{kind}"].unflatten(0, (config.key_value_heads, -1))
                for name in ("query", "key", "value")
            ]
            theirs[f"self_attention.linear_qkv.{kind}"] = torch.cat(groups, dim=1).flatten(0, 1)
            theirs[f"self_attention.linear_proj.{kind}"] = ours[f"attention.output.{kind}"]
        if f"mlp.up.{kind}" in ours:
            both = [ours[f"mlp.{name}.{kind}"] for name in ("gate", "up") if f"mlp.{name}.{kind}" in ours]
            theirs[f"mlp.linear_fc1.{kind}"] = torch.cat(both)
            theirs[f"mlp.linear_fc2.{kind}"] = ours[f"mlp.down.{kind}"]
    return theirs | _experts(ours)


def _experts(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each expert has matrices of its own in Megatron's module."""
    theirs = {}
    for name, own in (
        ("router.weight", "router.weight"),
        ("router.expert_bias", "router.selection_bias"),
        ("shared_experts.gate_weight", "shared_gate.weight"),
        ("shared_experts.linear_fc2.weight", "shared.down.weight"),
    ):
        if f"mlp.{own}" in ours:
            theirs[f"mlp.{name}"] = ours[f"mlp.{own}"]
    if "mlp.shared.up.weight" in ours:
        both = [ours[f"mlp.shared.{name}.weight"] for name in ("gate", "up")]
        theirs["mlp.shared_experts.linear_fc1.weight"] = torch.cat(both)
    for number in range(len(ours.get("mlp.experts.up", ()))):
        gate, up, down = (ours[f"mlp.experts.{name}"][number] for name in ("gate", "up", "down"))
        expert = f"mlp.experts.local_experts.{number}"
        theirs |= {
            f"{expert}.linear_fc1.weight": torch.cat([gate, up]),
            f"{expert}.linear_fc2.weight": down,
        }
    return theirs


def part_of_rank(name: str, tensor: Tensor, config: MegatronModelConfig, rank: int, size: int) -> Tensor:
    """What Megatron's tensor-parallel ``rank`` holds of a whole matrix.

    Rows of what is column-parallel in its language and of the vocabulary, columns of what is row-parallel,
    all of a norm, of positions and of a row-parallel bias; of a gated matrix its rows of both halves.
    """
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(size, dim=1)[rank]
    if "linear_fc1" in name and config.is_gated:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if any(word in name for word in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")):
        return tensor.chunk(size)[rank]
    return tensor


def build(config: MegatronModelConfig) -> nn.Module:
    """Megatron's model of the same architecture, from its unfused layers, which run on a CPU."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    normalization = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.normalization]
    theirs = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.key_value_heads,
        ffn_hidden_size=config.ffn_size,
        normalization=normalization,
        layernorm_epsilon=config.layernorm_eps,
        gated_linear_unit=config.is_gated,
        activation_func=F.silu if config.is_gated else F.gelu,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=_tensor_size(),
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **_of_experts(config),
    )
    return GPTModel(
        theirs,
        get_gpt_layer_local_spec(normalization=normalization)
        if config.num_experts is None
        else _mixed(theirs),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope" if config.position_embedding == "rotary" else "learned_absolute",
        rotary_base=int(config.rotary_base),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    )


def _mixed(theirs: Any) -> Any:
    """Layers with experts, whose norms are named as by the layers that run on a GPU: fused with nothing."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        theirs, use_transformer_engine=False, normalization=theirs.normalization
    )
    for spec in block.layer_specs:
        if hasattr(spec.submodules.mlp.submodules, "experts"):
            names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
            spec.submodules.sharded_state_dict_keys_map = names
    return block


def _of_experts(config: MegatronModelConfig) -> dict[str, Any]:
    """The options of a checkpoint, computed by what a CPU has."""
    if config.num_experts is None:
        return {}
    options = options_of_experts(config)
    here = dict(moe_grouped_gemm=False, moe_token_dispatcher_type="allgather", moe_aux_loss_coeff=0.0)
    number = options.pop("num_experts")
    return options | here | dict(num_moe_experts=number)


def _our_step(model: ParallelModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = model.mesh.sum_of_loss(model.forward_backward([batch], batch.num_valid_tokens))
    gradients = {name: whole(item.grad) for name, item in model.named_parameters() if item.grad is not None}
    return loss.item(), gradients


def _their_step(model: nn.Module, batch: Batch) -> float:
    length = batch.input_ids.shape[1]
    positions = torch.arange(length).expand_as(batch.input_ids).contiguous()
    hidden_from = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    counts = batch.labels != IGNORED_LABEL
    losses = model(batch.input_ids, positions, hidden_from, labels=batch.labels.clamp(min=0))
    summed = (losses * counts).sum()
    (summed / batch.num_valid_tokens).backward()
    return float(summed)


def _tensor_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_world_size())


@contextlib.contextmanager
def _megatron_of_size(tensor_parallel_size: int) -> Iterator[int]:
    """While inside, Megatron's own global state over the ranks here; yields the tensor-parallel rank."""
    warnings.filterwarnings("ignore", module="megatron")
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    # Its attention asks for a random stream and for buffers of the current CUDA device on a CPU too.
    tracker, device = get_cuda_rng_tracker(), torch.cuda.current_device
    tracker.fork = lambda name="": contextlib.nullcontext()
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    try:
        yield parallel_state.get_tensor_model_parallel_rank()
    finally:
        parallel_state.destroy_model_parallel()
        del tracker.fork
        torch.cuda.current_device = device
        logging.disable(logging.NOTSET)

"""The one place where a layout is applied, in the one order that works (docs/layout-order.md)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from mtnlg.config import MegatronModelConfig, PrecisionConfig, TrainingConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.pipeline_rules import splits_backward
from mtnlg.config.prompt_tuning import prompt_adapter
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.parallel.adapters import lay_out_adapter
from mtnlg.parallel.async_tensor import use_async_tensor_parallel
from mtnlg.parallel.context import share_context
from mtnlg.parallel.cpu_kernels import use_cpu_kernels
from mtnlg.parallel.cpu_linear import onednn_linear
from mtnlg.parallel.data import make_memory, shard_over_replicas
from mtnlg.parallel.dropout import separate_attention_dropout
from mtnlg.parallel.encoder_decoder import PairStage, cut_pair_stage, separate_pair_dropout, split_pair
from mtnlg.parallel.expert import divide_experts
from mtnlg.parallel.float8 import Float8Product, check_float8, use_float8
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.model import ParallelModel
from mtnlg.parallel.pipeline import check_division, cut_stage, keep_loss_for_two_passes
from mtnlg.parallel.quantized import quantize_divided
from mtnlg.parallel.recompute import recompute_activations
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.tensor import split_matrices
from mtnlg.parallel.weights import initialize
from mtnlg.quantization import quantize_model, round_in_training


def lay_out(
    config: MegatronModelConfig,
    mesh: Mesh,
    seed: int = 1234,
    precision: PrecisionConfig | None = None,
    switches: TrainingConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> ParallelModel:
    """Build the model of ``config`` on ``mesh``, with the same first weights in every layout.

    Args:
        config: the architecture.
        mesh: this rank's place in the layout.
        seed: of the initialisation.
        precision: number formats; ``None`` is float32.
        switches: recomputation, offloading and compilation; ``None`` is none of them.
        adapter: is trained instead of the model's own weights; see also
            :func:`~mtnlg.parallel.adapters.start_laid_out_adapter`.
    """
    precision, switches = precision or PrecisionConfig(), switches or TrainingConfig()
    adapter = adapter or prompt_adapter(config)
    switches.check_device(mesh.device.type)
    check_float8(precision, mesh.device.type)
    stages = [_lay_out_stage(config, mesh, number, precision, switches, adapter) for number in mesh.stages]
    check_division(stages, config, mesh)
    for stage in stages:
        make_memory(stage, mesh)
        stage.decoder.tie_weights()  # ``to_empty`` gives a shared parameter two memories
        initialize(stage, config, seed)
    return ParallelModel(stages, config, mesh, precision, adapter)


def _lay_out_stage(
    config: MegatronModelConfig,
    mesh: Mesh,
    number: int,
    precision: PrecisionConfig,
    switches: TrainingConfig,
    adapter: AdapterConfig | None,
) -> Stage:
    """One stage, laid out on the meta device: memory comes when it is known which part is ours."""
    decoder = _cut(config, mesh, number)
    is_qlora = config.quantize and adapter is not None  # the head and its loss stay as they are
    if is_qlora and mesh.tensor_size == 1:
        quantize_model(decoder.layers, QuantizeConfig.from_dict(config.quantize_config))
    float8 = Float8Product() if precision.fp8 else None
    sends_while_multiplying = use_async_tensor_parallel(mesh, switches) and float8 is None
    split_matrices(decoder, mesh, sends_while_multiplying, float8)
    if isinstance(decoder, MegatronEncoderDecoder):
        split_pair(decoder, mesh)
    if mesh.device.type == "cpu":
        use_cpu_kernels(
            decoder, is_divided=mesh.tensor_size > 1, runs_once=not splits_backward(mesh.layout)
        )
    if float8 is not None and mesh.tensor_size == 1:
        use_float8(decoder, float8)
    if config.quantize and adapter is None:
        whole = mesh.device.type == "cpu" and not splits_backward(mesh.layout)
        numbers = QuantizeConfig.from_dict(config.quantize_config)
        round_in_training(decoder, numbers, onednn_linear if whole else F.linear)
    if splits_backward(mesh.layout):
        keep_loss_for_two_passes(decoder)
    divide_experts(decoder, mesh)
    if is_qlora and mesh.tensor_size > 1:
        quantize_divided(decoder, QuantizeConfig.from_dict(config.quantize_config), mesh)
    if adapter is not None:
        lay_out_adapter(decoder, adapter, mesh)
    share_context(decoder, mesh)
    separate_attention_dropout(decoder, mesh)
    if isinstance(decoder, MegatronEncoderDecoder):
        separate_pair_dropout(decoder, mesh)
    recompute_activations(decoder, switches, mesh)
    stage = _make_stage(decoder, mesh, number)
    shard_over_replicas(stage, mesh, precision)
    return stage


def _cut(config: MegatronModelConfig, mesh: Mesh, number: int) -> MegatronLmDecoder:
    """What stage ``number`` runs, without memory."""
    with torch.device("meta"):
        if not config.has_encoder:
            decoder = MegatronLmDecoder(config)
            cut_stage(decoder, mesh.layout, number)
            return decoder
        pair = MegatronEncoderDecoder(config)
    cut_pair_stage(pair, mesh.layout, number)
    return cast(MegatronLmDecoder, pair)  # what is done to a decoder is done to both of its parts


def _make_stage(decoder: MegatronLmDecoder, mesh: Mesh, number: int) -> Stage:
    shards = mesh.tensor_size if mesh.layout.sequence_parallel else 1
    if isinstance(decoder, MegatronEncoderDecoder):
        return PairStage(decoder, number, is_part=mesh.num_stages > 1, sequence_shards=shards)
    return Stage(decoder, number, shards, shares_context=mesh.context_size > 1)

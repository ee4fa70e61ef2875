"""``layout: auto``: a layout for the devices present, by the rules of the papers, with its reasons.

Megatron's rules (Narayanan et al. 2021, arXiv 2104.04473, section 3): divide the model over as few
devices as its memory asks for; tensor parallelism first, up to the devices of one node, then pipeline
parallelism over nodes; everything left is data parallelism, whose optimizer state is divided (ZeRO-1,
Rajbhandari et al. 2020, arXiv 1910.02054). A sequence whose activations do not fit is divided too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mtnlg.config import (
    BatchConfig,
    ConfigError,
    LayoutConfig,
    MegatronModelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    layout_problems,
)
from mtnlg.parallel.launch import join_slurm
from mtnlg.parallel.mesh import ranks_present
from mtnlg.planning.memory import MemoryNeed, memory_of_rank
from mtnlg.training.device import choose_device

USABLE_SHARE = 0.9  # of a device's memory: the rest is the library's, and holes between blocks
GB = 1e9


@dataclass(frozen=True)
class _Task:
    """What is to be laid out."""

    model: MegatronModelConfig
    sequence_length: int
    batch: BatchConfig
    precision: PrecisionConfig
    training: TrainingConfig
    target_length: int = 0

    def micro_batches(self, layout: LayoutConfig) -> int:
        replicas = layout.data_parallel_size or 1
        return max(1, self.batch.global_batch_size // (self.batch.micro_batch_size * replicas))

    def divides_over(self, replicas: int) -> bool:
        step = self.batch.micro_batch_size * replicas
        return all(
            size is None or size % step == 0
            for size in (self.batch.global_batch_size, self.batch.ramp_start)
        )

    def is_valid(self, layout: LayoutConfig) -> bool:
        micro_batches = self.micro_batches(layout)
        fixed = (self.model, self.sequence_length, micro_batches, self.training, self.precision)
        if layout.sequence_parallel and self.target_length % layout.tensor_parallel_size:
            return False
        return not layout_problems(layout, *fixed)

    def memory(self, layout: LayoutConfig) -> MemoryNeed:
        rows, count = self.batch.micro_batch_size, self.micro_batches(layout)
        fixed = (self.precision, self.training, self.target_length)
        return memory_of_rank(layout, self.model, self.sequence_length, rows, count, *fixed)


def choose_layout(
    model: MegatronModelConfig,
    sequence_length: int,
    batch: BatchConfig,
    devices: int,
    devices_per_node: int,
    device_memory_bytes: float,
    precision: PrecisionConfig | None = None,
    training: TrainingConfig | None = None,
    base: LayoutConfig | None = None,
    may_leave_devices_idle: bool = True,
    target_length: int = 0,
) -> tuple[LayoutConfig, list[str]]:
    """The layout that divides the model least among those that fit.

    Args:
        model: the architecture.
        sequence_length: tokens of a sample.
        batch: samples of a step and of a micro-batch.
        devices: present in all.
        devices_per_node: that share a node's fast links.
        device_memory_bytes: of each.
        precision: number formats; ``None`` is float32.
        training: recomputation; ``None`` is none.
        base: settings besides the sizes; ``None`` is the defaults.
        may_leave_devices_idle: take fewer devices where the batch does not divide over all of them;
            a launcher's ranks must all be used.
        target_length: tokens that an encoder-decoder writes of each sample.

    Returns:
        The layout, and sentences that say why.

    Raises:
        ConfigError: no layout of these devices fits; the message says what the best one would need.
    """
    numbers, switches = precision or PrecisionConfig(), training or TrainingConfig()
    task = _Task(model, sequence_length, batch, numbers, switches, target_length)
    base = replace(base or LayoutConfig(), auto=False)
    limit = USABLE_SHARE * device_memory_bytes
    reasons = [_what_is_there(task, devices, devices_per_node, device_memory_bytes)]
    smallest: tuple[float, LayoutConfig] | None = None
    too_large: dict[int, float] = {}  # by model-parallel size, the least that one would need
    for used in range(devices, 0, -1):
        for layout in _candidates(task, base, used, devices_per_node):
            if not task.is_valid(layout):
                continue
            need = task.memory(layout).total
            if need <= limit:
                return layout, reasons + _why(task, layout, devices, limit, too_large)
            if used == devices:
                divided = layout.model_parallel_size
                too_large[divided] = min(need, too_large.get(divided, need))
            if smallest is None or need < smallest[0]:
                smallest = (need, layout)
        if not may_leave_devices_idle:
            break
    raise ConfigError(_nothing_fits(task, devices, limit, smallest))


def resolve_auto_layout(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """``config`` with a layout for the devices of this machine, or for a launcher's ranks.

    Every rank of a launcher finds the same: the numbers of ranks come from it, and devices are alike.

    Returns:
        The config and the reasons; ``config`` itself and none where its layout is not ``auto``.

    Raises:
        ConfigError: no layout fits.
    """
    if not config.layout.auto:
        return config, []
    join_slurm()
    device_type = choose_device(config.training.device)
    present = ranks_present()
    local = torch.cuda.device_count() if device_type == "cuda" else 1
    if present is not None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", min(present, local)))
    if device_type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local
    layout, reasons = choose_layout(
        config.model,
        config.data.sequence_length,
        config.batch,
        present or local,
        local,
        memory,
        config.precision,
        config.training,
        config.layout,
        may_leave_devices_idle=present is None,
        target_length=config.data.target_length(config.model.has_encoder),
    )
    return replace(config, layout=layout), reasons


def _candidates(
    task: _Task, base: LayoutConfig, devices: int, devices_per_node: int
) -> Iterator[LayoutConfig]:
    """Layouts of exactly ``devices`` ranks: the model divided least first, and then over tensor ranks
    of one node rather than over stages, over either rather than over the sequence."""
    sizes = [
        (tensor, pipeline, context)
        for tensor in _divisors(devices_per_node)
        for pipeline in _divisors(devices)
        for context in _divisors(devices)
        if devices % (tensor * pipeline * context) == 0
        and task.divides_over(devices // (tensor * pipeline * context))
    ]
    sizes.sort(key=lambda size: (size[0] * size[1] * size[2], size[2], size[1]))
    for tensor, pipeline, context in sizes:
        layout = replace(
            base,
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            context_parallel_size=context,
            data_parallel_size=devices // (tensor * pipeline * context),
        )
        for experts in _divisors(task.model.num_experts or 1):
            yield replace(layout, expert_parallel_size=experts)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _what_is_there(task: _Task, devices: int, devices_per_node: int, memory: float) -> str:
    batch = task.batch
    return (
        f"{devices:,} device{'s' * (devices > 1)} with {memory / GB:,.0f} GB each, {devices_per_node} to a "
        f"node, for {task.model.num_parameters / 1e9:,.2f} billion parameters in {task.precision.dtype}, "
        f"sequences of {task.sequence_length:,} tokens and batches of {batch.global_batch_size:,} "
        f"(micro-batches of {batch.micro_batch_size})."
    )


def _why(
    task: _Task, layout: LayoutConfig, devices: int, limit: float, too_large: dict[int, float]
) -> list[str]:
    """A sentence for each decision."""
    tensor, pipeline, context = (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
    )
    divided = layout.model_parallel_size
    reasons = [
        f"Divided over {size:,} it would need at least {need / GB:,.0f} GB a device, {limit / GB:,.0f} GB "
        "can be used."
        for size, need in sorted(too_large.items())
        if size < divided
    ]
    if not too_large and not task.divides_over(layout.num_ranks):
        reasons.append(
            f"Batches of {task.batch.global_batch_size:,} do not divide over {layout.num_ranks} replicas."
        )
    need = task.memory(layout)
    reasons.append(
        f"Divided over {divided:,} it needs {need.total / GB:,.1f} GB a device: weights "
        f"{need.weights / GB:,.1f}, gradients {need.gradients / GB:,.1f}, optimizer "
        f"{need.optimizer / GB:,.1f}, activations {need.activations / GB:,.1f}."
    )
    if tensor > 1:
        reasons.append(
            f"tensor_parallel_size {tensor}: its messages are the largest, so it stays within a node."
        )
    if pipeline > 1:
        count = task.micro_batches(layout)
        idle = (pipeline - 1) / (count + pipeline - 1)
        reasons.append(
            f"pipeline_parallel_size {pipeline}: a node is not enough; stages idle {idle:.0%} of a step "
            f"({count} micro-batches)."
        )
    if context > 1:
        reasons.append(f"context_parallel_size {context}: a sequence's activations do not fit otherwise.")
    if layout.expert_parallel_size > 1:
        reasons.append(f"expert_parallel_size {layout.expert_parallel_size}: all experts do not fit.")
    replicas = layout.data_parallel_size or 1
    reasons.append(
        f"data_parallel_size {replicas}: what is left"
        + (f"; sharding {layout.data_parallel_sharding}." if replicas > 1 else ".")
    )
    if layout.num_ranks < devices:
        reasons.append(
            f"{devices - layout.num_ranks} of {devices} devices stay idle: no layout of more divides the "
            "batch and the model; change batch.global_batch_size to use them."
        )
    return reasons


def _nothing_fits(
    task: _Task, devices: int, limit: float, smallest: tuple[float, LayoutConfig] | None
) -> str:
    if smallest is None:
        return (
            f"layout: auto finds no layout of {devices} devices that divides the model and batches of "
            f"{task.batch.global_batch_size} (micro-batches of {task.batch.micro_batch_size}); change "
            "batch.global_batch_size or the number of devices, or name a layout."
        )
    need, layout = smallest
    hint = "set training.activation_recomputation: full, lower batch.micro_batch_size, or use more devices"
    return (
        f"layout: auto finds no layout of {devices} devices that fits: the best (tensor "
        f"{layout.tensor_parallel_size}, pipeline {layout.pipeline_parallel_size}, context "
        f"{layout.context_parallel_size}, data {layout.data_parallel_size}) would need {need / GB:,.1f} GB "
        f"a device, and {limit / GB:,.1f} GB can be used; {hint}, or name a layout."
    )

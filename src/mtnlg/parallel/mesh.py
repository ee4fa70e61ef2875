"""Where this process sits: its device, its rank, and the axes of the layout it belongs to.

Ranks are numbered with tensor parallelism innermost (its messages are the largest and most frequent,
so its ranks should be neighbours), then context, data and pipeline. Data parallelism has two axes:
over ``replicate`` weights are copied and over ``shard`` they are split.

The same ranks are looked at in three ways, each a mesh of torch's: by what they compute
(:data:`AXES`), by how they hold the weights (:data:`WEIGHT_AXES`: ranks that share a sequence hold the
same weights, so ``context`` counts as more replicas), and by how they hold experts
(:data:`EXPERT_AXES`).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtnlg.config import ConfigError, LayoutConfig
from mtnlg.config.expert_rules import sharing_problems
from mtnlg.config.tensor_rules import NEEDS_GPUS, refusal

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
WEIGHT_AXES = ("weight_pipeline", "weight_copy", "weight_part", "weight_tensor")
EXPERT_AXES = ("expert_pipeline", "expert_copy", "expert_part", "expert", "expert_tensor")


@dataclass(frozen=True)
class Mesh:
    """One rank's place in a layout. In one process every size is 1 and ``device_mesh`` is ``None``.

    Args:
        layout: the layout, its ``data_parallel_size`` known.
        device: where this rank computes.
        rank: number of this rank among all.
        device_mesh: torch's mesh with the axes :data:`AXES`.
        weight_mesh: the same ranks with the axes :data:`WEIGHT_AXES`.
        expert_mesh: the same ranks with the axes :data:`EXPERT_AXES`; ``None`` without expert
            parallelism, where experts are held like other weights.
        ends_group: the ranks of this pipeline that hold the first and the last stage (tied
            embeddings); ``None`` where one rank holds both.
    """

    layout: LayoutConfig
    device: torch.device
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    weight_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    ends_group: dist.ProcessGroup | None = None
    _axes: dict[tuple[str, ...], DeviceMesh] = field(default_factory=dict, repr=False, compare=False)

    def size(self, axis: str) -> int:
        """Ranks along ``axis``."""
        if self.device_mesh is None:
            return 1
        return self.axis(axis).size()

    def coordinate(self, axis: str) -> int:
        """This rank's place along ``axis``."""
        return 0 if self.device_mesh is None else self.axis(axis).get_local_rank()

    @property
    def num_ranks(self) -> int:
        """All ranks of the layout."""
        return self.layout.num_ranks

    @property
    def pipeline_rank(self) -> int:
        """Place of this rank in its pipeline."""
        return self.coordinate("pipeline")

    @property
    def pipeline_size(self) -> int:
        """Ranks of a pipeline."""
        return self.size("pipeline")

    @property
    def stages(self) -> list[int]:
        """The stages that this rank runs, in the order of the model."""
        return self.layout.stages_of_rank(self.pipeline_rank)

    @property
    def num_stages(self) -> int:
        """Stages of a pipeline."""
        return self.layout.num_stages

    @property
    def has_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return 0 in self.stages

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank holds the head and computes the loss."""
        return self.num_stages - 1 in self.stages

    @property
    def replica(self) -> int:
        """Data-parallel replica that this rank belongs to: which share of each batch it reads."""
        return self.coordinate("replicate") * self.size("shard") + self.coordinate("shard")

    @property
    def num_replicas(self) -> int:
        """Data-parallel replicas."""
        return self.size("replicate") * self.size("shard")

    @property
    def context_rank(self) -> int:
        """Place of this rank among those that share each sequence."""
        return self.coordinate("context")

    @property
    def context_size(self) -> int:
        """Ranks that share each sequence."""
        return self.size("context")

    @property
    def tensor_rank(self) -> int:
        """Place of this rank among those that share each matrix."""
        return self.coordinate("tensor")

    @property
    def tensor_size(self) -> int:
        """Ranks that share each matrix."""
        return self.size("tensor")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and the terminal."""
        return self.rank == 0

    def axis(self, *names: str) -> DeviceMesh:
        """The sub-mesh of some axes of one of the three views.

        Raises:
            ValueError: there is only one process, or no view has these axes.
        """
        if names in self._axes:  # torch takes milliseconds to cut a mesh
            return self._axes[names]
        for view in (self.device_mesh, self.weight_mesh, self.expert_mesh):
            if view is not None and set(names) <= set(view.mesh_dim_names or ()):
                self._axes[names] = view[names if len(names) > 1 else names[0]]
                return self._axes[names]
        raise ValueError(f"This layout has no mesh with the axes {', '.join(names)}.")

    def sum_over_replicas(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel replicas, in place; every rank gets it."""
        return self._sum(value, ("replicate", "shard"))

    def sum_of_loss(self, value: Tensor) -> Tensor:
        """Sum over stages, replicas and parts of the context, in place: all but tensor-parallel ranks."""
        return self._sum(value, ("pipeline", "replicate", "shard", "context"))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        return self._sum(value, AXES)

    def largest_in_stage(self, values: list[int]) -> list[int]:
        """The largest of each of ``values`` over the ranks that run the same stages: what they decide by.

        Ranks that send each other messages in the same places must never decide by numbers of their own.
        """
        if self.device_mesh is None:
            return values
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        for axis in AXES[1:]:
            if self.size(axis) > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.axis(axis).get_group())
        return largest.tolist()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.device_mesh is not None:
            dist.barrier()

    def broadcast_object(self, value: object) -> object:
        """Rank 0's ``value`` on every rank (a small picklable object)."""
        if self.device_mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _sum(self, value: Tensor, axes: tuple[str, ...]) -> Tensor:
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(value, group=self.axis(axis).get_group())
        return value


def ranks_present() -> int | None:
    """Ranks that a launcher (torchrun, SLURM) has started around this process; ``None`` without one."""
    world = os.environ.get("WORLD_SIZE")
    return int(world) if world and "RANK" in os.environ else None


def resolve_layout(layout: LayoutConfig, device_type: str) -> LayoutConfig:
    """``layout`` with ``data_parallel_size`` filled in where it was left open.

    Under a launcher the ranks present decide; alone, the GPUs present, and on the CPU it is 1.

    Args:
        layout: the layout asked for.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the layout does not fit the ranks or devices that are there.
    """
    if layout.auto:
        raise ConfigError(
            "layout is auto: choose one first, with mtnlg.planning.resolve_auto_layout(config), as "
            "mtnlg train does."
        )
    if layout.async_tensor_parallel and device_type == "cpu":
        raise ConfigError(refusal(NEEDS_GPUS))
    if layout.cpu_offload and device_type == "cpu":
        raise ConfigError(
            "layout.cpu_offload is true: the weights and the optimizer state of a run on the CPU are in "
            "the CPU's memory already. Leave it out."
        )
    present = ranks_present()
    model_parallel = layout.model_parallel_size
    if layout.data_parallel_size is None:
        available = present
        if available is None:
            available = torch.cuda.device_count() if device_type == "cuda" else model_parallel
        if available < model_parallel or available % model_parallel:
            raise ConfigError(
                f"layout: tensor_parallel_size x pipeline_parallel_size x context_parallel_size is "
                f"{model_parallel}: it must divide the {available} ranks or devices present."
            )
        layout = replace(layout, data_parallel_size=available // model_parallel)
    if problems := sharing_problems(layout):
        raise ConfigError(problems)
    if present is not None and present != layout.num_ranks:
        raise ConfigError(
            f"layout: {layout.num_ranks} ranks are asked for (tensor {layout.tensor_parallel_size} x "
            f"pipeline {layout.pipeline_parallel_size} x context {layout.context_parallel_size} x data "
            f"{layout.data_parallel_size}) and the launcher started {present}; leave "
            "layout.data_parallel_size out to use all."
        )
    if present is None and device_type == "cuda" and layout.num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"layout: {layout.num_ranks} ranks are asked for and this machine has "
            f"{torch.cuda.device_count()} GPUs; use training.device: cpu or a smaller layout."
        )
    return layout


def build_mesh(layout: LayoutConfig, device_type: str = "cpu", timeout_seconds: float = 1800.0) -> Mesh:
    """Join the other ranks and find this one's place.

    Args:
        layout: the layout asked for.
        device_type: ``cpu`` or ``cuda``.
        timeout_seconds: after which a rank that waits for another gives up.

    Raises:
        ConfigError: the layout does not fit the ranks that are there.
    """
    layout = resolve_layout(layout, device_type)
    if layout.num_ranks == 1:
        return Mesh(layout, torch.device(device_type))
    # It warns of two gathers where one might do, whenever a whole weight is put together: that is
    # rare here (samples, Muon), and gathering sums nothing.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = layout.backend or ("nccl" if device_type == "cuda" else "gloo")
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, timeout=timeout)
    if dist.get_world_size() != layout.num_ranks:
        raise ConfigError(
            f"layout: {layout.num_ranks} ranks are asked for and {dist.get_world_size()} are here."
        )
    world = init_device_mesh(device_type, (layout.num_ranks,), mesh_dim_names=("world",))
    views = {names: world._unflatten(0, sizes, names) for names, sizes in _views(layout).items()}
    return Mesh(
        layout,
        device,
        dist.get_rank(),
        views[AXES],
        views[WEIGHT_AXES],
        views.get(EXPERT_AXES),
        _ends_group(views[AXES], layout),
    )


def _views(layout: LayoutConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Sizes of each view's axes."""
    pipeline, tensor = layout.pipeline_parallel_size, layout.tensor_parallel_size
    context, expert = layout.context_parallel_size, layout.expert_parallel_size
    parts = layout.shard_size
    copies = (layout.data_parallel_size or 1) // parts
    views: dict[tuple[str, ...], tuple[int, ...]] = {AXES: (pipeline, copies, parts, context, tensor)}
    # Ranks that share a sequence hold parts of the weights too, or copies where nothing is split.
    if layout.data_parallel_sharding == "ddp":
        copies *= context
    else:
        parts *= context
    views[WEIGHT_AXES] = (pipeline, copies, parts, tensor)
    if expert > 1:
        if layout.data_parallel_sharding == "ddp":
            views[EXPERT_AXES] = (pipeline, copies // expert, 1, expert, tensor)
        else:
            views[EXPERT_AXES] = (pipeline, copies, parts // expert, expert, tensor)
    return views


def _ends_group(device_mesh: DeviceMesh, layout: LayoutConfig) -> dist.ProcessGroup | None:
    """The group of the first and last stage of this rank's pipeline; every rank must call this."""
    if len(layout.stages_of_rank(0)) > 1 and layout.num_stages - 1 in layout.stages_of_rank(0):
        return None
    if device_mesh.size(0) == 1:
        return None
    mine = None
    for pipeline in device_mesh.mesh.flatten(1).t().tolist():  # ranks of one pipeline, first to last
        ends = [pipeline[0], pipeline[-1]]
        group = dist.new_group(ends)
        if dist.get_rank() in ends:
            mine = group
    return mine

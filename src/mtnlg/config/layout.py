"""How one model is divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config.errors import ConfigError
from mtnlg.config.pipeline_notation import notation_problem, parse_stages

PIPELINE_SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "looped_bfs",
    "interleaved_zero_bubble",
    "zbv",
    "dualpipev",
)
# Each rank of these runs two stages, from the ends of the model towards its middle and back.
V_SCHEDULES = ("zbv", "dualpipev")
# Each rank of these runs several stages, every so many-th of the model.
LOOPED_SCHEDULES = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
DATA_PARALLEL_SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "hybrid")
CONTEXT_PARALLEL_METHODS = ("ring", "all_to_all")
SIZES = ("tensor", "pipeline", "data", "context", "expert")


@dataclass
class LayoutConfig:
    """A layout is a value: the product of its sizes is the number of ranks.

    Experts take no ranks of their own: ``expert_parallel_size`` of the ranks that run other data
    (replicas, and parts of the context) share the experts between them.

    Args:
        auto: choose the sizes for the devices that are there (``layout: auto`` in a recipe);
            ``mtnlg.planning.resolve_auto_layout`` does, and ``mtnlg train`` calls it.
        tensor_parallel_size: ranks that share each layer's matrices (keep it within one node).
        pipeline_parallel_size: ranks that the layers are divided over.
        data_parallel_size: replicas; ``None`` is the ranks present divided by the other sizes
            (1 when ``mtnlg train`` starts its own ranks on a machine without GPUs).
        context_parallel_size: ranks that share each sequence.
        expert_parallel_size: ranks that share the experts of each layer (mixture of experts).
        sequence_parallel: with tensor parallelism, also split norms, dropout and the residual stream
            over the sequence.
        async_tensor_parallel: send while multiplying; ``None`` switches it on where the GPU, torch and
            the other settings allow it.
        pipeline_schedule: ``gpipe``, ``1f1b``, ``interleaved_1f1b``, ``looped_bfs``,
            ``interleaved_zero_bubble``, ``zbv`` or ``dualpipev``.
        stages_per_rank: stages that each pipeline rank runs; ``None`` is what ``pipeline_layout`` has,
            or 2, for the schedules of several (interleaved, looped, V-shaped) and 1 for the others.
        pipeline_layout: which layers each stage runs: ``None`` balances computed cost; a list of
            numbers of layers, one for each stage; or a string in Megatron's notation such as
            ``Et*3|(tt|)*28,ttL`` (E embedding, t layer, L loss, | next stage).
        data_parallel_sharding: what is divided over the replicas besides the data. ``ddp``: nothing.
            ``zero1``: optimizer state. ``zero2``: also gradients. ``zero3``: also parameters.
            ``hybrid``: as ``zero3`` within groups of ``data_parallel_shard_size``, copied over groups.
        data_parallel_shard_size: ranks of one group of ``hybrid``.
        context_parallel_method: ``ring`` (keys and values go round) or ``all_to_all`` (Ulysses: each
            rank gets the whole sequence of some heads).
        cpu_offload: keep float32 parameters, gradients and optimizer state in the CPU's memory, where
            the optimizer then steps. The GPU holds what it computes with: one layer at a time with
            ``zero3`` and ``hybrid``, all weights in ``precision.dtype`` otherwise.
        backend: ``nccl``, ``gloo`` or ``None`` for what fits the device.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    auto: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    sequence_parallel: bool = True
    async_tensor_parallel: bool | None = None
    pipeline_schedule: str = "1f1b"
    stages_per_rank: int | None = None
    pipeline_layout: str | list[int] | None = None
    data_parallel_sharding: str = "zero1"
    data_parallel_shard_size: int | None = None
    context_parallel_method: str = "ring"
    cpu_offload: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        problems = []
        sizes = [f"{name}_parallel_size" for name in SIZES]
        for name in (*sizes, "stages_per_rank", "data_parallel_shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"layout.{name} is {value}: it must be at least 1.")
        choices = {
            "pipeline_schedule": PIPELINE_SCHEDULES,
            "data_parallel_sharding": DATA_PARALLEL_SHARDINGS,
            "context_parallel_method": CONTEXT_PARALLEL_METHODS,
            "backend": (None, "nccl", "gloo"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                listed = ", ".join(str(choice) for choice in valid if choice)
                problems.append(f"layout.{name} is {getattr(self, name)!r}: choose one of {listed}.")
        problems += _pipeline_layout_problems(self.pipeline_layout)
        for name in [*sizes, "pipeline_layout"] if self.auto else ():
            if getattr(self, name) not in (1, None):
                problems.append(
                    f"layout.{name} is {getattr(self, name)}: with layout.auto it is chosen; leave it out, "
                    "or say layout.auto: false."
                )
        if problems:
            raise ConfigError(problems)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one batch together: what one replica takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def num_ranks(self) -> int:
        """Ranks that the whole layout takes (``data_parallel_size`` counts 1 while it is open)."""
        return self.model_parallel_size * (self.data_parallel_size or 1)

    @property
    def num_chunks(self) -> int:
        """Stages that each pipeline rank runs."""
        if self.pipeline_parallel_size == 1:
            return 1
        if self.pipeline_schedule in V_SCHEDULES:
            return self.stages_per_rank or 2
        if self.pipeline_schedule not in LOOPED_SCHEDULES:
            return self.stages_per_rank or 1
        described = self._num_described_stages // self.pipeline_parallel_size
        return self.stages_per_rank or described or 2

    @property
    def _num_described_stages(self) -> int:
        """Stages that ``pipeline_layout`` describes; 0 where it is ``None`` or refused."""
        stated = self.pipeline_layout
        if isinstance(stated, str):
            return 0 if notation_problem(stated) else len(parse_stages(stated))
        return len(stated or ())

    @property
    def num_stages(self) -> int:
        """Stages that the layers are divided over."""
        return self.pipeline_parallel_size * self.num_chunks

    @property
    def shard_size(self) -> int:
        """Replicas that share one copy of the parameters' and optimizer's parts."""
        replicas = self.data_parallel_size or 1
        if self.data_parallel_sharding == "ddp":
            return 1
        if self.data_parallel_sharding == "hybrid":
            return self.data_parallel_shard_size or replicas
        return replicas

    def stages_of_rank(self, pipeline_rank: int) -> list[int]:
        """The stages that a pipeline rank runs, in the order of the model.

        Looped schedules deal stages out in turn; the V-shaped ones go there and back, so that the
        first rank holds both ends.
        """
        size = self.pipeline_parallel_size
        if self.pipeline_schedule in V_SCHEDULES and size > 1:
            return [pipeline_rank, 2 * size - 1 - pipeline_rank]
        return [pipeline_rank + size * chunk for chunk in range(self.num_chunks)]

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that runs ``stage``."""
        size = self.pipeline_parallel_size
        is_on_way_back = self.pipeline_schedule in V_SCHEDULES and stage >= size
        return 2 * size - 1 - stage if is_on_way_back else stage % size


def _pipeline_layout_problems(stated: str | list[int] | None) -> list[str]:
    """What is wrong with ``pipeline_layout`` whatever the model."""
    if isinstance(stated, str):
        problem = notation_problem(stated)
        return [] if problem is None else [problem]
    if stated is not None and (not stated or min(stated) < 0):
        return [
            f"layout.pipeline_layout is {stated}: it must be the number of layers of each stage, such as "
            "[3, 4, 4, 3]."
        ]
    return []

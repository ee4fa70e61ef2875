"""How one model is divided over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config.errors import ConfigError
from mtnlg.config.model import MegatronModelConfig

PIPELINE_SCHEDULES = ("1f1b", "gpipe")
DATA_PARALLEL_SHARDINGS = ("full", "gradients", "none")


@dataclass
class LayoutConfig:
    """A layout is a value: the product of its sizes is the number of ranks.

    Args:
        tensor_parallel_size: ranks that share each layer's matrices (keep it within one node).
        pipeline_parallel_size: stages the layers are divided over.
        data_parallel_size: replicas; ``None`` is the ranks present divided by the other sizes
            (1 when ``mtnlg train`` starts its own ranks on a machine without GPUs).
        sequence_parallel: with tensor parallelism, also split norms, dropout and the residual stream
            over the sequence.
        pipeline_schedule: ``1f1b`` or ``gpipe``.
        data_parallel_sharding: what FSDP2 shards over the replicas: ``full`` (parameters, gradients
            and optimizer state: ZeRO-3), ``gradients`` (parameters stay whole between forward and
            backward: ZeRO-2), ``none`` (plain replicas).
        backend: ``nccl``, ``gloo`` or ``None`` for what fits the device.

    Raises:
        ConfigError: naming every size that is out of range.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int | None = None
    sequence_parallel: bool = True
    pipeline_schedule: str = "1f1b"
    data_parallel_sharding: str = "full"
    backend: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"layout.{name} is {value}: it must be at least 1.")
        choices = {
            "pipeline_schedule": PIPELINE_SCHEDULES,
            "data_parallel_sharding": DATA_PARALLEL_SHARDINGS,
            "backend": (None, "nccl", "gloo"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                listed = ", ".join(str(choice) for choice in valid if choice)
                problems.append(f"layout.{name} is {getattr(self, name)!r}: choose one of {listed}.")
        if problems:
            raise ConfigError(problems)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one replica takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_ranks(self) -> int:
        """Ranks that the whole layout takes (``data_parallel_size`` counts 1 while it is open)."""
        return self.model_parallel_size * (self.data_parallel_size or 1)


def layout_problems(
    layout: LayoutConfig, model: MegatronModelConfig, sequence_length: int, micro_batches: int
) -> list[str]:
    """Every reason why ``layout`` does not fit ``model``; empty when it fits.

    Args:
        layout: the layout asked for.
        model: the architecture to be divided.
        sequence_length: tokens of one sample.
        micro_batches: micro-batches each replica runs in one step.
    """
    tensor, pipeline = layout.tensor_parallel_size, layout.pipeline_parallel_size
    problems = []
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.key_value_heads),
        ("intermediate_size", model.ffn_size),
    ):
        if count % tensor:
            problems.append(
                f"layout.tensor_parallel_size is {tensor}: it must divide model.{name} ({count})."
            )
    if -(-model.vocab_size // tensor) * (tensor - 1) >= model.vocab_size:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: the last rank would hold none of the "
            f"{model.vocab_size} vocabulary entries."
        )
    if tensor > 1 and layout.sequence_parallel and sequence_length % tensor:
        problems.append(
            f"data.sequence_length is {sequence_length}: with layout.sequence_parallel it must be "
            f"divisible by layout.tensor_parallel_size ({tensor})."
        )
    if pipeline > model.num_hidden_layers:
        problems.append(
            f"layout.pipeline_parallel_size is {pipeline}: more stages than "
            f"model.num_hidden_layers ({model.num_hidden_layers})."
        )
    if layout.pipeline_schedule == "1f1b" and pipeline > 1 and micro_batches < pipeline:
        problems.append(
            f"layout.pipeline_parallel_size is {pipeline}: each replica needs at least as many "
            f"micro-batches a step as stages, and has {micro_batches}; raise "
            "batch.global_batch_size, lower batch.micro_batch_size, or use "
            "layout.pipeline_schedule: gpipe."
        )
    return problems


def layers_of_stages(model: MegatronModelConfig, num_stages: int) -> list[range]:
    """Which layers each pipeline stage runs: contiguous, in order, work as even as whole layers allow.

    Work is counted in parameters, to which multiplications and memory are proportional. The embedding
    counts as work of the first stage (``pre_process_first``), the head of the last
    (``post_process_last``). Of the divisions with the lightest heaviest stage, the one that gives
    earlier stages less is taken: they hold more micro-batches in flight.

    Args:
        model: the architecture.
        num_stages: pipeline stages, at most as many as layers.
    """
    layer = model.num_parameters_per_layer
    end = model.vocab_size * model.hidden_size / layer  # in layers
    first, last = end * model.pre_process_first, end * model.post_process_last
    counts = _divide_layers(model.num_hidden_layers, num_stages, first, last)
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts)]


def _divide_layers(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Layers of each stage; ``first`` and ``last`` are the ends' extra work, in layers."""
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    counts = [1] * stages  # every stage runs at least one layer
    for _ in range(layers - stages):
        lightest = min(range(stages), key=lambda stage: (counts[stage] + extra[stage], -stage))
        counts[lightest] += 1
    return counts

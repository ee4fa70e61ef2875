"""Pipeline parallelism: which layers each stage runs, and the schedule that runs them.

The schedules are torch's: GPipe (Huang et al. 2019, arXiv 1811.06965), 1F1B and interleaved 1F1B
(Narayanan et al. 2021, arXiv 2104.04473), looped breadth-first (Lamy-Poirier 2022, arXiv 2211.05953),
interleaved zero bubble and ZBV (Qi et al. 2023, arXiv 2401.10241), and DualPipeV (after DeepSeek-V3,
arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import _PipelineStageBase

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.config.division import layers_of_stages
from mtnlg.config.layout import LOOPED_SCHEDULES
from mtnlg.config.pipeline_rules import takes
from mtnlg.model import MegatronLmDecoder
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage
from mtnlg.tokens.batch import Batch

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
Shapes = tuple[tuple[int, int], ...]  # of the token ids that a micro-batch begins with

FIRST_INPUTS = ("input_ids", "decoder_input_ids")  # of a batch
_ONE_STAGE: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_SEVERAL_STAGES: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def cut_stage(decoder: MegatronLmDecoder, layout: LayoutConfig, number: int) -> None:
    """Leave in ``decoder`` only what the stage ``number`` runs; no parameter changes its name."""
    config: MegatronModelConfig = decoder.config
    mine = layers_of_stages(config, layout)[number]
    for index in range(config.total_layers):
        if index not in mine:
            del decoder.layers[str(index)]
    if number > 0:
        decoder.embedding = None
    if number < layout.num_stages - 1:
        decoder.head = None


def keep_loss_for_two_passes(decoder: MegatronLmDecoder) -> None:
    """Let the loss keep its gradients for schedules that go back twice: for inputs and for weights."""
    if decoder.head is not None:
        decoder.head.loss_function = partial(decoder.head.loss_function, runs_once=False)


def check_division(stages: Sequence[Stage], config: MegatronModelConfig, mesh: Mesh) -> None:
    """Make sure that the pipeline as a whole has built every layer and both ends exactly once.

    Every rank calls this.

    Raises:
        AssertionError: naming what was dropped or doubled.
    """
    parts = [f"layer {index}" for index in range(config.total_layers)]
    ends = ["embedding", "head", "encoder_end"][: 2 + config.has_encoder]
    parts += ends
    built = torch.zeros(len(parts), dtype=torch.int64, device=mesh.device)
    for stage in stages:
        for index in stage.decoder.layers:
            built[int(index)] += 1
        for place, name in enumerate(ends, config.total_layers):
            built[place] += getattr(stage.decoder, name) is not None
    if mesh.pipeline_size > 1:
        dist.all_reduce(built, group=mesh.axis("pipeline").get_group())
    wrong = [f"{part} {count} times" for part, count in zip(parts, built.tolist()) if count != 1]
    if wrong:
        raise AssertionError(f"The stages of the pipeline have built {', '.join(wrong)}, not once.")


def runs_of(layout: LayoutConfig, count: int) -> list[tuple[str, int]]:
    """The schedules that run ``count`` micro-batches one after the other, and how many each runs.

    It is the layout's own, but steps of a batch-size ramp may have fewer micro-batches than it needs, or
    not whole rounds of them. Others with the same stages on the same ranks then run what is left, which
    is so few that they hold no more activations.
    """
    schedule, size = layout.pipeline_schedule, layout.pipeline_parallel_size
    if takes(layout, count):
        return [(schedule, count)]
    if schedule in _ONE_STAGE:
        return [("gpipe", count)]
    if schedule in LOOPED_SCHEDULES:
        return [(schedule, count - count % size), ("looped_bfs", count % size)]
    return [("zbv", count)]


class _Stage(PipelineStage):
    """torch's stage, which says when it has run a pass for weights alone."""

    def __init__(self, pipeline: Pipeline, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pipeline = pipeline

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> None:
        super().backward_weight_one_chunk(*args, **options)
        self._pipeline.after_weights()


class Pipeline:
    """Runs micro-batches through the stages.

    Args:
        stages: those that this rank runs, in the order of the model.
        mesh: this rank's place.
        config: the whole architecture.
        dtype: of what stages send each other; ``None`` is float32.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh,
        config: MegatronModelConfig,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.stages = list(stages)
        self.mesh = mesh
        self.config = config
        self.dtype = dtype or torch.float32
        self.group = mesh.axis("pipeline").get_group()
        self._schedules: dict[tuple[str, int, Shapes], Schedule] = {}
        self._factor = torch.ones((), device=mesh.device)
        # Called when a pass for weights alone has left gradients that no hook of theirs was told of.
        self.after_weights: Callable[[], None] = lambda: None

    def forward_backward(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        """Run all micro-batches forward and backward; the loss is multiplied by ``factor``.

        Returns:
            The summed loss without the factor; zero on ranks without the last stage.
        """
        self._factor = factor
        total = torch.zeros((), device=self.mesh.device)
        start = 0
        for name, count in runs_of(self.mesh.layout, len(batches)):
            total += self._run(name, batches[start : start + count])
            start += count
        return total / factor

    def _run(self, name: str, batches: Sequence[Batch]) -> Tensor:
        """One schedule from its first to its last micro-batch: the loss with the factor, or zero."""
        schedule = self._schedule(name, len(batches), _shapes(batches[0]))
        whole = _concatenate(batches)
        ids = tuple(whole.pop(name) for name in FIRST_INPUTS if name in whole)
        inputs = ids if self.mesh.has_first_stage else ()
        losses: list[Tensor] = []
        if self.mesh.has_last_stage:
            schedule.step(*inputs, target=whole["labels"], losses=losses, return_outputs=False, **whole)
            return torch.stack([loss.detach() for loss in losses]).sum()
        whole.pop("labels")
        schedule.step(*inputs, return_outputs=False, **whole)
        return torch.zeros((), device=self.mesh.device)

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only: the summed loss on the rank of the last stage, zero elsewhere.

        Whatever the schedule, ranks take their stages in the order of the model.
        """
        total = torch.zeros((), device=self.mesh.device)
        passed: tuple[Tensor, ...] | None = None  # from one stage of this rank straight to the next
        options = stage_options(batch)
        labels = options.pop("labels")
        for stage in self.stages:
            inputs = self._inputs_of(stage.number, batch) if passed is None else passed
            is_last = stage.number == self.mesh.num_stages - 1
            output = stage(*inputs, labels=labels if is_last else None, **options)
            passed = None
            if is_last:
                total = output
                continue
            sent = output if isinstance(output, tuple) else (output,)
            if (next_rank := self._rank_of(stage.number + 1)) == self.mesh.pipeline_rank:
                passed = sent
            else:
                for tensor in sent:
                    dist.send(tensor.contiguous(), group=self.group, group_dst=next_rank)
        return total

    def _inputs_of(self, number: int, batch: Batch) -> tuple[Tensor, ...]:
        """Token ids for the first stage, what the stage before sends for any other."""
        if number == 0:
            return first_inputs(batch)
        messages = self._empty_messages(_shapes(batch))
        for tensor in messages:
            dist.recv(tensor, group=self.group, group_src=self._rank_of(number - 1))
        return messages

    def _rank_of(self, number: int) -> int:
        return self.mesh.layout.rank_of_stage(number)

    def _empty_messages(self, shapes: Shapes) -> tuple[Tensor, ...]:
        """Room for what crosses from stage to stage: hidden states [batch, sequence / shards, hidden].

        Stages of an encoder-decoder send those of the source and of the target, and the tables of
        relative positions [buckets, 2 * heads / ranks] (:mod:`mtnlg.parallel.encoder_decoder`).
        """
        config, mesh = self.config, self.mesh
        shards = mesh.tensor_size if mesh.layout.sequence_parallel else 1
        sizes = [(rows, columns // shards, config.hidden_size) for rows, columns in shapes]
        messages = [torch.empty(size, dtype=self.dtype, device=mesh.device) for size in sizes]
        if config.has_encoder and not config.relative_attention_per_layer:
            table = (
                config.relative_attention_num_buckets,
                2 * config.num_attention_heads // mesh.tensor_size,
            )
            messages.append(torch.empty(table, dtype=self.dtype, device=mesh.device))
        return tuple(messages)

    def _schedule(self, name: str, count: int, shapes: Shapes) -> Schedule:
        key = (name, count, shapes)
        if key not in self._schedules:
            # Batch-size ramps change the count: keep only what the present one needs.
            self._schedules = {
                other: made for other, made in self._schedules.items() if other[0] != name
            } | {key: self._make_schedule(*key)}
        return self._schedules[key]

    def _make_schedule(self, name: str, count: int, shapes: Shapes) -> Schedule:
        stages: list[_PipelineStageBase] = [self._make_stage(stage, shapes) for stage in self.stages]
        # ``scale_grads=False``: the factor is the only owner of gradient scale.
        if name in _ONE_STAGE:
            return _ONE_STAGE[name](stages[0], count, loss_fn=self._scaled_loss, scale_grads=False)
        return _SEVERAL_STAGES[name](stages, count, loss_fn=self._scaled_loss, scale_grads=False)

    def _make_stage(self, stage: Stage, shapes: Shapes) -> _Stage:
        mesh = self.mesh
        hidden = tuple(tensor.requires_grad_() for tensor in self._empty_messages(shapes))
        ids = tuple(torch.empty(shape, dtype=torch.long, device=mesh.device) for shape in shapes)
        loss = torch.empty((), device=mesh.device, requires_grad=True)
        # Shapes are given: torch would otherwise run the first micro-batch once more to learn them.
        return _Stage(
            self,
            stage,
            stage.number,
            mesh.num_stages,
            mesh.device,
            input_args=ids if stage.number == 0 else hidden,
            output_args=loss if stage.number == mesh.num_stages - 1 else hidden,
            group=self.group,
        )

    def _scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output * self._factor


def first_inputs(batch: Batch) -> tuple[Tensor, ...]:
    """What the first stage takes of ``batch``: token ids."""
    given = [getattr(batch, name) for name in FIRST_INPUTS]
    return tuple(tensor for tensor in given if tensor is not None)


def stage_options(batch: Batch) -> dict[str, Any]:
    """What every stage takes of ``batch`` by name; the labels too."""
    return {
        field.name: value
        for field in fields(batch)
        if field.name not in FIRST_INPUTS and (value := getattr(batch, field.name)) is not None
    }


def _shapes(batch: Batch) -> Shapes:
    return tuple((ids.shape[0], ids.shape[1]) for ids in first_inputs(batch))


def _concatenate(batches: Sequence[Batch]) -> dict[str, Any]:
    """The micro-batches one after the other, which is how the schedule cuts them apart again."""
    names = [field.name for field in fields(batches[0]) if getattr(batches[0], field.name) is not None]
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}

"""Pipeline parallelism: which layers each stage runs, and the schedule that runs them.

The schedules (1F1B, Narayanan et al. 2021, arXiv 2104.04473; GPipe, Huang et al. 2019) are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.config.division import layers_of_stages
from mtnlg.model import MegatronLmDecoder
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage
from mtnlg.tokens.batch import Batch

_SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def cut_stage(decoder: MegatronLmDecoder, layout: LayoutConfig, number: int) -> None:
    """Leave in ``decoder`` only what the stage ``number`` runs; no parameter changes its name."""
    config: MegatronModelConfig = decoder.config
    mine = layers_of_stages(config, layout.num_stages)[number]
    for index in range(config.num_hidden_layers):
        if index not in mine:
            del decoder.layers[str(index)]
    if number > 0:
        decoder.embedding = None
    if number < layout.num_stages - 1:
        decoder.head = None


class Pipeline:
    """Runs micro-batches through the stages.

    Args:
        stages: those that this rank runs, in the order of the model.
        mesh: this rank's place.
        hidden_size: width of what stages send each other.
        dtype: of what they send; ``None`` is float32.
    """

    def __init__(
        self, stages: Sequence[Stage], mesh: Mesh, hidden_size: int, dtype: torch.dtype | None = None
    ) -> None:
        (self.stage,) = stages
        self.mesh = mesh
        self.hidden_size = hidden_size
        self.dtype = dtype or torch.float32
        self.group = mesh.axis("pipeline").get_group()
        self._schedules: dict[tuple[int, int, int], PipelineScheduleSingle] = {}
        self._factor = torch.ones((), device=mesh.device)

    def forward_backward(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        """Run all micro-batches forward and backward; the loss is multiplied by ``factor``.

        Returns:
            The summed loss without the factor; zero on stages before the last.
        """
        rows, columns = batches[0].input_ids.shape
        schedule = self._schedule(len(batches), rows, columns)
        self._factor = factor
        whole = _concatenate(batches)
        ids = whole.pop("input_ids")
        inputs = (ids,) if self.mesh.has_first_stage else ()
        losses: list[Tensor] = []
        if self.mesh.has_last_stage:
            schedule.step(*inputs, target=whole["labels"], losses=losses, return_outputs=False, **whole)
            return torch.stack([loss.detach() for loss in losses]).sum() / factor
        whole.pop("labels")
        schedule.step(*inputs, return_outputs=False, **whole)
        return torch.zeros((), device=self.mesh.device)

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward only: the summed loss on the last stage, zero before it."""
        mesh = self.mesh
        rows, columns = batch.input_ids.shape
        inputs = batch.input_ids
        if not mesh.has_first_stage:
            inputs = self._empty_hidden(rows, columns)
            dist.recv(inputs, group=self.group, group_src=mesh.pipeline_rank - 1)
        labels = batch.labels if mesh.has_last_stage else None
        output = self.stage(inputs, labels, batch.position_ids, batch.document_ids)
        if mesh.has_last_stage:
            return output
        dist.send(output.contiguous(), group=self.group, group_dst=mesh.pipeline_rank + 1)
        return torch.zeros((), device=mesh.device)

    def _empty_hidden(self, rows: int, columns: int) -> Tensor:
        """Room for hidden states that cross from stage to stage: [batch, sequence / shards, hidden]."""
        shards = self.mesh.tensor_size if self.mesh.layout.sequence_parallel else 1
        shape = (rows, columns // shards, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.mesh.device)

    def _schedule(self, count: int, rows: int, columns: int) -> PipelineScheduleSingle:
        key = (count, rows, columns)
        if key not in self._schedules:
            # Batch-size ramps change the count: keep only what the present one needs.
            self._schedules = {key: self._make_schedule(count, rows, columns)}
        return self._schedules[key]

    def _make_schedule(self, count: int, rows: int, columns: int) -> PipelineScheduleSingle:
        mesh = self.mesh
        hidden = self._empty_hidden(rows, columns).requires_grad_()
        ids = torch.empty(rows, columns, dtype=torch.long, device=mesh.device)
        loss = torch.empty((), device=mesh.device, requires_grad=True)
        # Shapes are given: torch would otherwise run the first micro-batch once more to learn them.
        stage = PipelineStage(
            self.stage,
            mesh.pipeline_rank,
            mesh.num_stages,
            mesh.device,
            input_args=ids if mesh.has_first_stage else hidden,
            output_args=loss if mesh.has_last_stage else hidden,
            group=self.group,
        )
        # torch's 1F1B wants a micro-batch for each stage. With fewer (in a batch-size ramp) GPipe holds
        # no more of them than 1F1B would.
        kind = ScheduleGPipe if count < mesh.num_stages else _SCHEDULES[mesh.layout.pipeline_schedule]
        # ``scale_grads=False``: the factor is the only owner of gradient scale.
        return kind(stage, count, loss_fn=self._scaled_loss, scale_grads=False)

    def _scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output * self._factor


def _concatenate(batches: Sequence[Batch]) -> dict[str, Any]:
    """The micro-batches one after the other, which is how the schedule cuts them apart again."""
    joined: dict[str, Any] = {}
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is not None:
            joined[name] = torch.cat(parts)
    return joined

"""One rank's share of a step: its stage of the model over all rows at once, keys and values in pages.

Rank 0 has the rows and wants the logits; between the two, hidden states go from stage to stage, and each
rank of the last stage sends its part of the vocabulary. Every rank lays the step out alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.generation.attention_kernel import AttentionKernel, KernelShape
from mtnlg.generation.fast_runner import attend_rows
from mtnlg.generation.mixed_adapters import AdapterMixer
from mtnlg.generation.paged_attention import PagePool
from mtnlg.generation.prepared_stage import PreparedStage
from mtnlg.generation.rank_adapters import ShareOfBase
from mtnlg.generation.row_counts import filled_up
from mtnlg.generation.runner import Row
from mtnlg.generation.step_plan import StepPlan, plan_step
from mtnlg.parallel.inference import ReadWeights
from mtnlg.parallel.mesh import Mesh

MIN_TOKENS = 64  # in a micro-batch of a pipeline: fewer take as long as one token


class StageRunner:
    """Runs this rank's stage.

    Args:
        stage: what this rank runs.
        mesh: this rank's place.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
        deterministic: tokens' numbers depend on nothing but their own sequence.
        compile: as for :class:`~mtnlg.generation.attention_kernel.AttentionKernel`.
        read: gives the model's weights, which adapters with magnitudes ask for.
    """

    def __init__(
        self,
        stage: PreparedStage,
        mesh: Mesh,
        num_pages: int,
        page_size: int,
        deterministic: bool = False,
        compile: str = "off",
        read: ReadWeights | None = None,
    ) -> None:
        self._read = read
        self.stage, self.mesh, self.num_pages, self.page_size = stage, mesh, num_pages, page_size
        self.deterministic = deterministic
        size, device, dtype = stage.config.head_size, stage.device, stage.dtype
        self._pools = {
            layer: PagePool(num_pages, page_size, stage.num_heads, size, dtype, device)
            for layer in stage.layers
        }
        shape = KernelShape(stage.num_heads, stage.num_queries, size, page_size, dtype, device.type)
        self._kernel = AttentionKernel(shape, compile, deterministic)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor | None:
        """All rows' logits, float32 [sum of num_logits, vocab], on rank 0."""
        return self._step(rows, gives_logits=True)

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor] | None:
        """Each row's hidden states after the final norm, [new, hidden], on rank 0."""
        states = self._step(rows, gives_logits=False)
        return None if states is None else list(states.split([len(row.ids) for row in rows]))

    @torch.inference_mode()
    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        of, to = (torch.tensor(list(pages), device=self.stage.device) for pages in (sources, targets))
        for pool in self._pools.values():
            pool.copy(of, to)

    def _step(self, rows: Sequence[Row], gives_logits: bool) -> Tensor | None:
        groups = [list(rows[start:end]) for start, end in self._groups(rows)]
        sent: list[tuple[dist.Work | None, Tensor]] = []  # what is sent must not be freed before
        own: list[Tensor] = []  # of what rank 0 wants, where this is rank 0
        self._lay_out_adapters(rows)
        for group in groups:
            plan = plan_step(
                group, self.page_size, self.stage.fewest, self.deterministic, self.stage.device
            )
            if self.stage.mixer is not None:
                self.stage.mixer.begin(group, plan)
            hidden = self._run_stage(plan)
            if not self.mesh.has_last_stage:
                sent.append(self._send(hidden, self.mesh.rank + self.mesh.tensor_size))
                continue
            output = self._output(hidden, plan, group, gives_logits)
            if output is not None and self.mesh.is_main:
                own.append(output)
            elif output is not None:
                sent.append(self._send(output, 0))
        result = None
        if self.mesh.is_main:
            result = torch.cat([self._collect(group, own, gives_logits) for group in groups])
        for work, _tensor in sent:
            if work is not None:
                work.wait()
        return result

    def _lay_out_adapters(self, rows: Sequence[Row]) -> None:
        if self.stage.mixer is None and any(row.adapter is not None for row in rows):
            assert self._read is not None
            base = ShareOfBase(self.stage.config, self.mesh, self._read, self.stage.dtype)
            self.stage.mixer = AdapterMixer(self.stage, base, self.deterministic)
        if self.stage.mixer is not None:
            self.stage.mixer.lay_out(rows)

    def _groups(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """Which rows go through the stages together, from and up to which.

        A stage works on one group while the next works on the one before.
        """
        total = sum(len(row.ids) for row in rows)
        wanted = min(self.mesh.num_stages, total // MIN_TOKENS) or 1
        groups, start, count = [], 0, 0
        for number, row in enumerate(rows):
            count += len(row.ids)
            if count >= total / wanted or number == len(rows) - 1:
                groups.append((start, number + 1))
                start, count = number + 1, 0
        return groups

    def _run_stage(self, plan: StepPlan) -> Tensor:
        """Hidden states [tokens and filling, hidden] after this rank's layers."""
        inputs = plan.ids
        if not self.mesh.has_first_stage:
            shape = (len(plan.ids), self.stage.config.hidden_size)
            inputs = torch.empty(shape, dtype=self.stage.dtype, device=self.stage.device)
            dist.recv(inputs, src=self.mesh.rank - self.mesh.tensor_size)

        mixer = self.stage.mixer

        def attend(layer: int, projected: Tensor) -> Tensor:
            if mixer is not None:
                mixer.put_prefixes(layer, projected)
            scores = self.stage.layers[layer].scores
            return attend_rows(plan, self._kernel, self._pools[layer], projected, scores)

        return self.stage.forward(inputs, plan.positions, attend)

    def _output(
        self, hidden: Tensor, plan: StepPlan, rows: Sequence[Row], gives_logits: bool
    ) -> Tensor | None:
        """This rank's part of what rank 0 wants of ``rows``; ``None`` where it is nothing."""
        assert self.stage.norm is not None and self.stage.output is not None
        if not gives_logits and self.mesh.tensor_rank > 0:
            return None  # every tensor-parallel rank has hidden states whole
        counts = [row.num_logits if gives_logits else len(row.ids) for row in rows]
        wanted = [
            place for own, count in zip(plan.of_rows, counts) for place in own[len(own) - count :].tolist()
        ]
        if not wanted:
            return None
        padded = wanted + [0] * (filled_up(len(wanted), self.stage.fewest) - len(wanted))
        if self.stage.mixer is not None:
            self.stage.mixer.narrow(padded)
        chosen = self.stage.norm(hidden[torch.tensor(padded, device=self.stage.device)])
        return (self.stage.output(chosen) if gives_logits else chosen)[: len(wanted)]

    def _collect(self, rows: Sequence[Row], own: list[Tensor], gives_logits: bool) -> Tensor:
        """What the ranks of the last stage have of ``rows``, put together."""
        count = sum(row.num_logits if gives_logits else len(row.ids) for row in rows)
        widths, device = self._widths(gives_logits), self.stage.device
        if count == 0:
            return torch.empty(0, sum(widths), device=device)
        last_stage = (self.mesh.num_stages - 1) * self.mesh.tensor_size
        parts = []
        for number, width in enumerate(widths):
            if last_stage + number == self.mesh.rank:
                parts.append(own.pop(0))
                continue
            part = torch.empty(count, width, dtype=self.stage.dtype, device=device)
            dist.recv(part, src=last_stage + number)
            parts.append(part)
        whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return whole.float() if gives_logits else whole

    def _widths(self, gives_logits: bool) -> list[int]:
        """Columns that ranks of the last stage send; the vocabulary is cut as ``torch.chunk`` does."""
        config, ranks = self.stage.config, self.mesh.tensor_size
        if not gives_logits:
            return [config.hidden_size]
        largest = -(-config.vocab_size // ranks)
        return [min(largest, config.vocab_size - largest * rank) for rank in range(ranks)]

    def _send(self, tensor: Tensor, rank: int) -> tuple[dist.Work | None, Tensor]:
        tensor = tensor.contiguous()
        return dist.isend(tensor, dst=rank), tensor

"""One rank's share of an encoder-decoder's step, over tensor- and pipeline-parallel ranks.

A source goes through the stages with layers of the encoder; the one with its end sends what was made of it
to all later stages, each of which keeps its own layers' keys and values of it. What is written goes from
the first stage, which has the embedding, straight to the first with a layer of the decoder, and on to
the last. Every rank is given the same rows in the same order, and so remembers the same sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.config.division import layers_of_stages
from mtnlg.generation.encoder_decoder_runner import EncoderDecoderRunner, _Written
from mtnlg.generation.runner import Row
from mtnlg.model import MegatronEncoderDecoder
from mtnlg.parallel.mesh import Mesh


class PairStageRunner(EncoderDecoderRunner):
    """Runs this rank's stage; rank 0 gets what is wanted.

    Args:
        stage: laid out by :func:`~mtnlg.parallel.inference.lay_out_for_inference`.
        mesh: this rank's place.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
        alone: run every row by itself.
        num_heads: of keys and values that this rank computes.
    """

    def __init__(
        self,
        stage: MegatronEncoderDecoder,
        mesh: Mesh,
        num_pages: int,
        page_size: int,
        alone: bool,
        num_heads: int,
    ) -> None:
        super().__init__(stage, num_pages, page_size, alone, num_heads)
        self.mesh, self._stage = mesh, mesh.pipeline_rank
        first = stage.config.num_hidden_layers
        divided = layers_of_stages(stage.config, mesh.layout)
        self._reads_last = next(n for n, layers in enumerate(divided) if first - 1 in layers)
        self._writes_first = next(n for n, layers in enumerate(divided) if first in layers)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor | None:  # type: ignore[override]
        """All rows' logits, float32 [sum of num_logits, vocab], on rank 0."""
        hidden = self._decode(rows)
        count, size = sum(row.num_logits for row in rows), self.mesh.tensor_size
        if count == 0:
            return torch.empty(0, self.vocab_size) if self.mesh.is_main else None
        part = self._logits(rows, hidden) if self.mesh.has_last_stage else None
        if part is not None and not self.mesh.is_main:
            dist.send(part.contiguous(), dst=0)
        if not self.mesh.is_main:
            return None
        largest = -(-self.vocab_size // size)  # the vocabulary is cut as ``torch.chunk`` does
        parts = []
        for number in range(size):
            rank = (self.mesh.num_stages - 1) * size + number
            if rank == self.mesh.rank:
                assert part is not None
                parts.append(part)
                continue
            width = min(largest, self.vocab_size - largest * number)
            parts.append(self._received((count, width), rank))
        return torch.cat(parts, dim=1).float()

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor] | None:  # type: ignore[override]
        """What the encoder made of each row's source, [source, hidden], on rank 0."""
        found = []
        for row in rows:
            assert row.source is not None, "the engine gives every row its source"
            states = self.encode(row.source)
            if self._reads_last == 0:
                found.append(states)
            elif self._stage == self._reads_last and self.mesh.tensor_rank == 0:
                dist.send(states.contiguous(), dst=0)
            elif self.mesh.is_main:
                shape = (len(row.source), self.model.config.hidden_size)
                found.append(self._received(shape, self._reads_last * self.mesh.tensor_size))
        return found if self.mesh.is_main else None

    @torch.inference_mode()
    def encode(self, ids: Sequence[int]) -> Tensor:
        """What the encoder makes of a text, [tokens, hidden], where its end or a decoder's layer is."""
        shape = (1, len(ids), self.model.config.hidden_size)
        if self._stage > self._reads_last:
            return self._received(shape, self._rank_of(self._reads_last))[0]
        inputs = torch.tensor([list(ids)], device=self.device)
        if self._stage > 0:
            inputs = self._received(shape, self._rank_of(self._stage - 1))
        hidden = self.model.encode(inputs)
        if self._stage < self._reads_last:
            self._send(hidden, self._stage + 1)
            return hidden[0]
        for later in range(self._stage + 1, self.mesh.num_stages):
            self._send(hidden, later)
        return hidden[0]

    def _through(
        self, ids: Tensor, memory_mask: Tensor | None, seen: Tensor, written: _Written, distances: Tensor
    ) -> Tensor:
        shape, inputs = (*ids.shape, self.model.config.hidden_size), ids
        if self._stage == 0 and self._writes_first > 0:
            inputs = self.model._embed(ids)
            self._send(inputs, self._writes_first)
        if self._stage < self._writes_first:
            return inputs
        if self._stage > 0:
            before = 0 if self._stage == self._writes_first else self._stage - 1
            inputs = self._received(shape, self._rank_of(before))
        hidden = super()._through(inputs, memory_mask, seen, written, distances)
        if not self.mesh.has_last_stage:
            self._send(hidden, self._stage + 1)
        return hidden

    def _rank_of(self, stage: int) -> int:
        """This tensor rank's counterpart on a stage."""
        return self.mesh.rank + (stage - self._stage) * self.mesh.tensor_size

    def _send(self, hidden: Tensor, stage: int) -> None:
        dist.send(hidden.contiguous(), dst=self._rank_of(stage))

    def _received(self, shape: Sequence[int], rank: int) -> Tensor:
        tensor = torch.empty(*shape, dtype=self.dtype, device=self.device)
        dist.recv(tensor, src=rank)
        return tensor

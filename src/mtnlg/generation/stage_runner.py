"""One rank's share of a step: its stage of the model over all rows at once, keys and values in pages.

The new tokens of all rows stand one after the other, as one sequence, through everything but attention,
where each row looks at its own pages. Rank 0 has the rows and wants the logits; between the two, hidden
states go from stage to stage, and each rank of the last stage sends its part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.generation.runner import Row
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.attention import scaled_dot_product
from mtnlg.parallel.inference import local_heads
from mtnlg.parallel.mesh import Mesh

MIN_TOKENS = 64  # in a micro-batch of a pipeline: fewer take as long as one token


class StepOfRows:
    """The rows of one pass: where their tokens stand, and their keys and values, as the model's cache.

    Args:
        rows: at least one, each with at least one new token.
        keys: one [pages, heads, page_size, head_dim] for each layer.
        values: likewise.
        device: of the model.
    """

    length = 0  # the mask that the model makes of it is not used

    def __init__(
        self, rows: Sequence[Row], keys: dict[int, Tensor], values: dict[int, Tensor], device: torch.device
    ) -> None:
        self.rows, self._keys, self._values, self._layer = rows, keys, values, 0
        self.counts = [len(row.ids) for row in rows]
        positions = [torch.arange(row.start, row.start + len(row.ids)) for row in rows]
        self.positions = torch.cat(positions).to(device)[None]
        size = next(iter(keys.values())).shape[2] if keys else 1
        pages = [torch.tensor(list(row.pages))[place // size] for row, place in zip(rows, positions)]
        self._page_of, self._place_of = torch.cat(pages).to(device), self.positions[0] % size
        ends = [row.start + len(row.ids) for row in rows]
        most = max(-(-end // size) for end in ends)
        # A row's first page fills up those of rows with fewer, where nothing looks.
        held = [[*row.pages[:most], *[row.pages[0]] * (most - len(row.pages))] for row in rows]
        self._held = torch.tensor(held, device=device)  # [rows, pages]
        columns = torch.arange(most * size, device=device)
        self._is_seen = (columns < torch.tensor(ends, device=device)[:, None])[:, None, None]
        self._ends = ends

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """File the new [1, heads, tokens, head_dim] of a layer; :meth:`attend` reads the pages."""
        self._layer = layer_index
        for pool, new in ((self._keys[layer_index], key), (self._values[layer_index], value)):
            pool[self._page_of, :, self._place_of] = new[0].transpose(0, 1).to(pool.dtype)
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attention of each row's new tokens over all of its own: [1, heads, tokens, head_dim]."""
        if max(self.counts) == 1:  # all rows at once: [rows, heads, 1, head_dim]
            alone = query[0].transpose(0, 1)[:, :, None]
            seen = self._is_seen if len(set(self._ends)) > 1 else self._is_seen[:1]
            keys, values = self._held_by(self._held)
            return scaled_dot_product(alone, keys, values, seen)[:, :, 0].transpose(0, 1)[None]
        done = [
            self._attend_one(number, part) for number, part in enumerate(query.split(self.counts, dim=2))
        ]
        return torch.cat(done, dim=2)

    def _attend_one(self, number: int, query: Tensor) -> Tensor:
        end, new = self._ends[number], query.shape[2]
        keys, values = self._held_by(self._held[number : number + 1])
        mask = None
        if new not in (1, end):
            mask = torch.ones(new, end, dtype=torch.bool, device=query.device).tril(end - new)[None, None]
        return scaled_dot_product(query, keys[:, :, :end], values[:, :, :end], mask)

    def _held_by(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, pages] → keys and values [rows, heads, pages * page_size, head_dim]"""
        keys, values = self._keys[self._layer][pages], self._values[self._layer][pages]
        return keys.transpose(1, 2).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)


@dataclass
class StageRunner:
    """Runs this rank's stage.

    Args:
        decoder: the stage, laid out by :func:`~mtnlg.parallel.inference.lay_out_for_inference`.
        mesh: this rank's place.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
        deterministic: one row after the other, so that none depends on its neighbours.
    """

    decoder: MegatronLmDecoder
    mesh: Mesh
    num_pages: int
    page_size: int
    deterministic: bool = False

    def __post_init__(self) -> None:
        config = self.decoder.config
        parameter = next(self.decoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._head, self.decoder.head = self.decoder.head, None
        shape = (self.num_pages, local_heads(self.decoder), self.page_size, config.head_size)
        layers = [int(name) for name in self.decoder.layers]
        self._keys = {layer: parameter.new_zeros(shape) for layer in layers}
        self._values = {layer: parameter.new_zeros(shape) for layer in layers}

    def close(self) -> None:
        """Give the decoder its head back, and the pages' memory up."""
        self.decoder.head, self._head = self._head, None
        self._keys, self._values = {}, {}
        self._use_attention(scaled_dot_product)  # a step's would hold on to the pages

    def _use_attention(self, function: Callable[..., Tensor]) -> None:
        for layer in self.decoder.layers.values():
            assert isinstance(layer, DecoderLayer)
            layer.attention.attention_function = function

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
        for pool in (*self._keys.values(), *self._values.values()):
            pool[torch.tensor(targets)] = pool[torch.tensor(sources)]

    def _step(self, rows: Sequence[Row], gives_logits: bool) -> Tensor | None:
        groups = [list(rows[start:end]) for start, end in self._groups(rows)]
        sent: list[tuple[dist.Work | None, Tensor]] = []  # what is sent must not be freed before
        found: list[Tensor] = []
        for group in groups:
            hidden = self._run_stage(group)
            if not self.mesh.has_last_stage:
                sent.append(self._send(hidden, self.mesh.rank + self.mesh.tensor_size))
                continue
            output = self._output(hidden, group, gives_logits)
            if output is None:
                continue
            if self.mesh.is_main:
                found.append(output)
            else:
                sent.append(self._send(output, 0))
        result = None
        if self.mesh.is_main:
            result = torch.cat([self._collect(group, found, gives_logits) for group in groups])
        for work, _tensor in sent:
            if work is not None:
                work.wait()
        return result

    def _groups(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """Which rows go through the stages together, from and up to which.

        A stage works on one group while the next works on the one before.
        """
        if self.deterministic:
            return [(number, number + 1) for number in range(len(rows))]
        total = sum(len(row.ids) for row in rows)
        wanted = min(self.mesh.num_stages, total // MIN_TOKENS) or 1
        groups, start, count = [], 0, 0
        for number, row in enumerate(rows):
            count += len(row.ids)
            if count >= total / wanted or number == len(rows) - 1:
                groups.append((start, number + 1))
                start, count = number + 1, 0
        return groups

    def _run_stage(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [1, tokens, hidden] after this rank's layers."""
        step = StepOfRows(rows, self._keys, self._values, self.device)
        self._use_attention(step.attend)
        if self.mesh.has_first_stage:
            inputs = torch.tensor([[token for row in rows for token in row.ids]], device=self.device)
        else:
            shape = (1, sum(step.counts), self.decoder.config.hidden_size)
            inputs = torch.empty(shape, dtype=self.dtype, device=self.device)
            dist.recv(inputs, src=self.mesh.rank - self.mesh.tensor_size)
        output = self.decoder(inputs, position_ids=step.positions, cache=step)
        assert output.hidden is not None
        return output.hidden

    def _output(self, hidden: Tensor, rows: Sequence[Row], gives_logits: bool) -> Tensor | None:
        """This rank's part of what rank 0 wants of ``rows``; ``None`` where it is nothing."""
        assert self._head is not None
        if not gives_logits:  # every tensor-parallel rank has them whole
            return self._head.norm(hidden[0]) if self.mesh.tensor_rank == 0 else None
        ends = torch.tensor([len(row.ids) for row in rows]).cumsum(0).tolist()
        wanted = [place for row, end in zip(rows, ends) for place in range(end - row.num_logits, end)]
        if not wanted:
            return None
        chosen = hidden[0, torch.tensor(wanted, device=self.device)]
        return self._head.output(self._head.norm(chosen))

    def _collect(self, rows: Sequence[Row], found: list[Tensor], gives_logits: bool) -> Tensor:
        """What the ranks of the last stage have of ``rows``, put together."""
        count = sum(row.num_logits if gives_logits else len(row.ids) for row in rows)
        if count == 0:
            return self._nothing(gives_logits)
        last_stage = (self.mesh.num_stages - 1) * self.mesh.tensor_size
        parts = []
        for number, width in enumerate(self._widths(gives_logits)):
            if last_stage + number == self.mesh.rank:
                parts.append(found.pop(0))
                continue
            part = torch.empty(count, width, dtype=self.dtype, device=self.device)
            dist.recv(part, src=last_stage + number)
            parts.append(part)
        whole = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return whole.float() if gives_logits else whole

    def _nothing(self, gives_logits: bool) -> Tensor:
        config = self.decoder.config
        return torch.empty(0, config.vocab_size if gives_logits else config.hidden_size, device=self.device)

    def _widths(self, gives_logits: bool) -> list[int]:
        """Columns that each rank of the last stage sends; the vocabulary is cut as ``torch.chunk`` does."""
        config, ranks = self.decoder.config, self.mesh.tensor_size
        if not gives_logits:
            return [config.hidden_size]
        largest = -(-config.vocab_size // ranks)
        return [min(largest, config.vocab_size - largest * rank) for rank in range(ranks)]

    def _send(self, tensor: Tensor, rank: int) -> tuple[dist.Work | None, Tensor]:
        tensor = tensor.contiguous()
        return dist.isend(tensor, dst=rank), tensor

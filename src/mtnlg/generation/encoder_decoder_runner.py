"""Runs encoder-decoders for the engine: what is read once, what is written in pages.

A request's prompt is its source. The encoder reads it when the request first takes part in a step, and
each layer's keys and values of it stay here, under the source itself, while requests over it go on and for
some time after. What the decoder writes lies in pages, as any decoder's tokens do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.linears import can_pack
from mtnlg.generation.paged_attention import zeros_as_used
from mtnlg.generation.prepared_modules import with_prepared_linears
from mtnlg.generation.runner import PAGE_SIZE, Row
from mtnlg.model import CrossDecoderLayer, MegatronEncoderDecoder
from mtnlg.model.virtual_tokens import prompt_with_virtual

KEPT_SOURCES = 32  # beside those of the requests in a step
KeysAndValues = tuple[Tensor, Tensor]
Source = tuple[int, ...]


class EncoderDecoderRunner:
    """Runs the plain model over rows, those with as many new tokens together.

    Args:
        model: the encoder-decoder.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
        alone: run every row by itself, so that its numbers do not depend on who else is there.
        num_heads: of keys and values that ``model`` computes; ``None`` is all.
    """

    is_invariant = False
    reads_source = True

    def __init__(
        self,
        model: MegatronEncoderDecoder,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        alone: bool = False,
        num_heads: int | None = None,
    ) -> None:
        self.model, self.num_pages, self.page_size = model, num_pages, page_size
        self.alone = alone
        config = model.config
        self.vocab_size, self.max_length = config.vocab_size, config.max_position_embeddings
        self.start_id = config.decoder_start_token_id
        self._memories: OrderedDict[Source, dict[int, KeysAndValues]] = OrderedDict()
        self._stacked: tuple[tuple[Source, ...], Tensor | None, dict[int, KeysAndValues]] | None = None
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        shape = (num_pages, page_size, num_heads or config.key_value_heads, config.head_size)
        layers = [index for index in map(int, model.layers) if index >= config.num_hidden_layers]
        self._keys = {layer: zeros_as_used(shape, self.dtype, self.device) for layer in layers}
        self._values = {layer: zeros_as_used(shape, self.dtype, self.device) for layer in layers}
        self._given = model
        self._prepare()

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        return self._logits(rows, self._decode(rows)).float()

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the encoder made of each row's source, [source, hidden]."""
        found = []
        for row in rows:
            assert row.source is not None, "the engine gives every row its source"
            states = self.encode(row.source)
            found.append(states[len(states) - len(row.source) :])  # virtual tokens are no part of it
        return found

    @torch.inference_mode()
    def encode(self, ids: Sequence[int]) -> Tensor:
        """What the encoder makes of a text, with virtual tokens before it, if any: [tokens, hidden]."""
        return self.model.encode(torch.tensor([self._read(ids)], device=self.device))[0]

    def _read(self, ids: Sequence[int]) -> list[int]:
        adapter = self.model.adapter
        return list(ids) if adapter is None else prompt_with_virtual(list(ids), adapter, self.vocab_size)

    @torch.inference_mode()
    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        for pool in (*self._keys.values(), *self._values.values()):
            pool[list(targets)] = pool[list(sources)]

    def refresh(self) -> None:
        """The weights have changed: sources are read anew."""
        self._prepare()
        self._memories.clear()
        self._stacked = None

    def _prepare(self) -> None:
        """Linear layers as a CPU multiplies them best; an adapter's are left as they are."""
        model = self._given
        is_divided = any("forward" in module.__dict__ for module in model.modules())
        if model.adapter is None and not is_divided and can_pack(self.device, self.dtype):
            model = with_prepared_linears(model, self.dtype)
        self.model = model

    # -- what was read

    def _memory(self, source: Source) -> dict[int, KeysAndValues]:
        """Keys and values [1, heads, source, head_dim] of each of the decoder's layers."""
        found = self._memories.get(source)
        if found is None:
            hidden = self.encode(source)[None]
            found = self._memories[source] = {}
            for number in self._keys:
                layer = self.model.layers[str(number)]
                assert isinstance(layer, CrossDecoderLayer)
                found[number] = layer.cross_attention.keys_and_values(hidden)
        self._memories.move_to_end(source)
        return found

    def _stack(self, sources: tuple[Source, ...]) -> tuple[Tensor | None, dict[int, KeysAndValues]]:
        """Memories of several rows, the shorter ones filled up: (mask [rows, 1, 1, source], layers)."""
        if self._stacked is not None and self._stacked[0] == sources:
            return self._stacked[1], self._stacked[2]
        memories = [self._memory(source) for source in sources]
        while len(self._memories) > KEPT_SOURCES + len(set(sources)):
            self._memories.popitem(last=False)
        sizes, mask = [len(self._read(source)) for source in sources], None
        longest = max(sizes)
        if min(sizes) < longest:
            mask = (torch.arange(longest) < torch.tensor(sizes)[:, None])[:, None, None].to(self.device)
        layers = {}
        for layer in self._keys:
            pairs = [memory[layer] for memory in memories]
            layers[layer] = (
                _joined([p[0] for p in pairs], longest),
                _joined([p[1] for p in pairs], longest),
            )
        self._stacked = (sources, mask, layers)
        return mask, layers

    # -- what is written

    def _decode(self, rows: Sequence[Row]) -> list[Tensor]:
        """Hidden states [new, hidden] of each row, before the head."""
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(index if self.alone else -len(row.ids), []).append(index)
        found: dict[int, Tensor] = {}
        for group in groups.values():
            found.update(zip(group, self._decode_together([rows[index] for index in group])))
        return [found[index] for index in range(len(rows))]

    def _decode_together(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [rows, new, hidden] of rows with as many new tokens."""
        sources = []
        for row in rows:
            assert row.source is not None, "the engine gives every row its source"
            sources.append(row.source)
        memory_mask, memories = self._stack(tuple(sources))
        new = len(rows[0].ids)
        starts = torch.tensor([row.start for row in rows])
        queries = starts[:, None] + torch.arange(new)  # [rows, new] positions
        keys = torch.arange(int(starts.max()) + new)
        distances = keys - queries[:, :, None]  # [rows, new, keys]
        written = _Written(self._keys, self._values, rows, self.page_size, queries, memories)
        ids = torch.tensor([list(row.ids) for row in rows], device=self.device)
        seen = (distances <= 0)[:, None].to(self.device)
        return self._through(ids, memory_mask, seen, written, distances.to(self.device))

    def _through(
        self, ids: Tensor, memory_mask: Tensor | None, seen: Tensor, written: _Written, distances: Tensor
    ) -> Tensor:
        """The decoder's hidden states [rows, new, hidden] of new tokens [rows, new]."""
        return self.model.decode(ids, None, memory_mask, seen, written, distances)

    def _logits(self, rows: Sequence[Row], hidden: Sequence[Tensor]) -> Tensor:
        """Logits of the tokens that they are wanted of, [sum of num_logits, vocab or a part of it]."""
        wanted = [states[len(states) - row.num_logits :] for row, states in zip(rows, hidden)]
        assert self.model.head is not None
        logits = self.model.head(torch.cat(wanted)).logits
        assert logits is not None
        return logits


class _Written:
    """Keys and values of several rows, seen through their pages, as the model's cache."""

    def __init__(
        self,
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
        rows: Sequence[Row],
        page_size: int,
        queries: Tensor,
        memories: dict[int, KeysAndValues],
    ) -> None:
        self._keys, self._values, self._memories = keys, values, memories
        device = next((pool.device for pool in keys.values()), torch.device("cpu"))
        self.length = int(queries[:, 0].max())
        num_keys = self.length + queries.shape[1]
        num_pages = -(-num_keys // page_size)
        # A row's table is filled up with its first page; what is read there is masked.
        tables = torch.tensor([([*row.pages[:num_pages]] + [row.pages[0]] * num_pages)[:num_pages]
                               for row in rows])  # fmt: skip
        places = torch.arange(num_keys)
        self._read = (tables[:, places // page_size].to(device), (places % page_size).to(device))
        self._write = (tables.gather(1, queries // page_size).to(device), (queries % page_size).to(device))

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> KeysAndValues:
        """Append [rows, heads, new, head_dim]; return everything held, [rows, heads, keys, head_dim]."""
        found = []
        for pool, tensor in ((self._keys[layer_index], key), (self._values[layer_index], value)):
            pool[self._write] = tensor.transpose(1, 2).to(pool.dtype)
            found.append(pool[self._read].transpose(1, 2))
        return found[0], found[1]

    def memory(self, layer_index: int, make: Callable[[], KeysAndValues]) -> KeysAndValues:
        """What was made of the sources when they were read."""
        return self._memories[layer_index]


def _joined(tensors: Sequence[Tensor], longest: int) -> Tensor:
    """[1, heads, source, head_dim] of each row → [rows, heads, longest, head_dim]."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].expand(len(tensors), -1, -1, -1)
    return torch.cat([F.pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors])

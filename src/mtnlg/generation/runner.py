"""The model as the engine sees it: rows of new tokens in, logits out, keys and values in pages.

The engine keeps books of which page belongs to whom; a runner holds the pages' memory and runs the
model over them. This file has the contract and the plainest runner, one sequence after another, which
is also the reference that faster ones are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mtnlg.generation.adapters import LoadedAdapter, OneAtATime
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.decoder import softcapped

PAGE_SIZE = 16  # tokens


@dataclass
class Row:
    """One sequence's share of a step.

    Args:
        ids: its new tokens, at least one.
        start: its tokens before these, whose keys and values are in ``pages``.
        pages: numbers of its pages in order, enough for ``start + len(ids)`` tokens. Pages that hold
            only tokens before ``start`` may be shared with other rows and are not written.
        num_logits: of how many of the last new tokens the logits are wanted; 0 is none.
        source: what an encoder-decoder's encoder reads.
        adapter: what the model is changed by for this row; its virtual tokens are among ``ids``.
    """

    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    num_logits: int = 1
    source: tuple[int, ...] | None = None
    adapter: LoadedAdapter | None = None


class Runner(Protocol):
    """Runs the model over rows; holds the memory of the pages."""

    num_pages: int
    page_size: int
    vocab_size: int
    max_length: int  # positions of the model
    is_invariant: bool  # a token's numbers do not depend on how its sequence was cut into rows

    def run(self, rows: Sequence[Row]) -> Tensor:
        """One step over all rows.

        Returns:
            float32 [sum of num_logits, vocab]: for each row in order, its last ``num_logits`` tokens.
        """

    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """Hidden states after the last layer and final norm of each row's new tokens, [new, hidden]."""

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let each target page hold what its source page holds: a sequence goes on in two ways."""


def with_own(rows: Sequence[Row], own: LoadedAdapter | None) -> Sequence[Row]:
    """The rows, with the model's own adapter where they name none."""
    if own is None:
        return rows
    return [row if row.adapter is not None else replace(row, adapter=own) for row in rows]


class RunnerWithAdapter:
    """A runner all of whose rows have one adapter (:class:`Runner`).

    Args:
        runner: does the work.
        loaded: the adapter; without virtual tokens.
    """

    takes_adapters = False

    def __init__(self, runner: Runner, loaded: LoadedAdapter) -> None:
        self._runner, self._loaded = runner, loaded
        self.num_pages, self.page_size = runner.num_pages, runner.page_size
        self.vocab_size, self.max_length = runner.vocab_size, runner.max_length
        self.is_invariant, self.copy_pages = runner.is_invariant, runner.copy_pages

    def run(self, rows: Sequence[Row]) -> Tensor:
        """See :class:`Runner`."""
        return self._runner.run([replace(row, adapter=self._loaded) for row in rows])

    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """See :class:`Runner`."""
        return self._runner.hidden([replace(row, adapter=self._loaded) for row in rows])


class PagedKeyValues:
    """Keys and values of one sequence, seen through its pages, as the model's cache.

    Args:
        keys: one [pages, heads, page_size, head_dim] for each layer.
        values: likewise.
        row: whose.
    """

    def __init__(self, keys: dict[int, Tensor], values: dict[int, Tensor], row: Row) -> None:
        self._keys, self._values = keys, values
        self.length = row.start
        end = row.start + len(row.ids)
        page_size = next(iter(keys.values())).shape[2]
        device = next(iter(keys.values())).device
        places = torch.arange(end, device=device)
        pages = torch.tensor(list(row.pages), device=device)
        self._page_of, self._place_of = pages[places // page_size], places % page_size

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [1, heads, new, head_dim]; return everything held."""
        new = slice(self.length, None)
        found = []
        for pool, tensor in ((self._keys[layer_index], key), (self._values[layer_index], value)):
            pool[self._page_of[new], :, self._place_of[new]] = tensor[0].transpose(0, 1).to(pool.dtype)
            found.append(pool[self._page_of, :, self._place_of].transpose(0, 1)[None])
        return found[0], found[1]


class PlainRunner:
    """Runs the plain model over one row after another.

    Args:
        model: the decoder.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
    """

    is_invariant = False
    takes_adapters = True

    def __init__(self, model: MegatronLmDecoder, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        self._adapters = OneAtATime(model)
        self.model, self.num_pages, self.page_size = model, num_pages, page_size
        config = model.config
        self.vocab_size, self.max_length = config.vocab_size, config.max_cached_length
        parameter = next(model.parameters())
        shape = (num_pages, config.key_value_heads, page_size, config.head_size)
        layers = [int(name) for name in model.layers]
        self._keys = {layer: parameter.new_zeros(shape) for layer in layers}
        self._values = {layer: parameter.new_zeros(shape) for layer in layers}

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """See :class:`Runner`."""
        logits = []
        for row in rows:
            ids = torch.tensor([list(row.ids)], device=next(self.model.parameters()).device)
            with self._adapters.applied(row.adapter):
                output = self.model(ids, cache=PagedKeyValues(self._keys, self._values, row))
            assert output.logits is not None
            logits.append(output.logits[0, len(row.ids) - row.num_logits :].float())
        return torch.cat(logits)

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """See :class:`Runner`."""
        found = []
        for row in rows:
            ids = torch.tensor([list(row.ids)], device=next(self.model.parameters()).device)
            head, self.model.head = self.model.head, None
            try:
                with self._adapters.applied(row.adapter):
                    output = self.model(ids, cache=PagedKeyValues(self._keys, self._values, row))
            finally:
                self.model.head = head
            assert output.hidden is not None and head is not None
            found.append(head.norm(output.hidden[0]))
        return found

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor) -> Tensor:
        """The logits that hidden states lead to: [tokens, hidden] → float32 [tokens, vocab]."""
        head = self.model.head
        assert head is not None
        if head.projection is not None:
            hidden = head.projection(hidden)
        logits: Tensor = softcapped(head.output(hidden), head.softcap)
        return logits.float()

    @torch.inference_mode()
    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`Runner`."""
        for pool in (*self._keys.values(), *self._values.values()):
            pool[list(targets)] = pool[list(sources)]

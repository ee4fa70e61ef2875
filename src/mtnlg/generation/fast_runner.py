"""The runner that requests are answered with: all rows of a step at once, over prepared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.adapters import own_adapter_of
from mtnlg.generation.attention_kernel import AttentionKernel, KernelShape
from mtnlg.generation.int8_pages import Int8PagePool
from mtnlg.generation.linears import fewest_rows
from mtnlg.generation.mixed_adapters import AdapterMixer
from mtnlg.generation.native_step import MOST_TOKENS, NativeStep, native_step
from mtnlg.generation.paged_attention import PagePool
from mtnlg.generation.prepared import PreparedDecoder
from mtnlg.generation.quantized_linears import have_kernel_for
from mtnlg.generation.row_counts import filled_up
from mtnlg.generation.runner import PAGE_SIZE, Row, with_own
from mtnlg.generation.scored_attention import attend_scored
from mtnlg.generation.stacked_updates import WholeBase
from mtnlg.generation.step_plan import Piece, StepPlan, cut_rows, plan_step, plan_tokens
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import adapter_set_aside
from mtnlg.model.attention_scores import ScoredAttention


class FastRunner:
    """Runs all rows of a step through prepared weights (:class:`~mtnlg.generation.runner.Runner`).

    Beside the model it holds a copy of its matrices in the form in which products read them
    (``weight_bytes``), and the pages.

    Args:
        model: a decoder that :func:`~mtnlg.generation.prepared.can_prepare` allows.
        num_pages: pages to hold memory for.
        page_size: tokens of one.
        dtype: to compute in; ``None`` is the model's.
        deterministic: every token's numbers are bit-equal whatever other rows there are, however its
            prompt was cut, and whether its beginning was computed now or before.
        compile: ``on``, ``off`` or ``auto`` (:class:`~mtnlg.generation.attention_kernel.AttentionKernel`).
        has_int8_cache: hold keys and values in 8 bits; attention over them is not compiled.
    """

    def __init__(
        self,
        model: MegatronLmDecoder,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | None = None,
        deterministic: bool = False,
        compile: str = "off",
        has_int8_cache: bool = False,
    ) -> None:
        self.model, self.num_pages, self.page_size = model, num_pages, page_size
        config, parameter = model.config, next(model.parameters())
        self.vocab_size, self.max_length = config.vocab_size, config.max_cached_length
        self.device, self.dtype = parameter.device, dtype or parameter.dtype
        self.is_invariant = deterministic
        self.takes_adapters = True
        has_integers = compile != "off" and have_kernel_for(model)
        self._in_tiles = compile != "off"
        self._fewest = 1 if has_integers else fewest_rows(self.device, self.dtype, self._in_tiles)
        heads, size = config.key_value_heads, config.head_size
        pool = Int8PagePool if has_int8_cache else PagePool
        self._pools = {
            int(layer): pool(num_pages, page_size, heads, size, self.dtype, self.device)
            for layer in model.layers
        }
        queries = config.num_attention_heads // heads
        shape = KernelShape(heads, queries, size, page_size, self.dtype, self.device.type)
        self.refresh()
        self.kernel = AttentionKernel(shape, "off" if has_int8_cache else compile, deterministic)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Prepare the weights again, after they were changed in the model.

        Keys and values that pages hold were computed with the old ones: forget them too.
        """
        self._mixer: AdapterMixer | None = None  # made when the first adapter comes
        self._native: list[NativeStep | None] = []  # made with the first step
        self._own = own_adapter_of(self.model)  # of rows that name none
        with adapter_set_aside(self.model):
            self._decoder = PreparedDecoder(self.model, self.dtype, self._fewest, self._in_tiles)

    @property
    def weight_bytes(self) -> int:
        """Memory of prepared weights, beside the model's own."""
        return self._decoder.num_bytes

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        return self._apart(rows, [row.num_logits for row in rows], self._logits_in_one_call, self._logits)

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        counts = [len(row.ids) for row in rows]
        return list(self._apart(rows, counts, self._hidden_in_one_call, self._normed).split(counts))

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor) -> Tensor | None:
        """The logits that hidden states lead to, for searches that look at these first.

        Args:
            hidden: [tokens, hidden] as :meth:`hidden` gave them.

        Returns:
            float32 [tokens, vocab]; ``None`` where adapters change the head, which goes with rows.
        """
        if self._own is not None or self._mixer is not None:
            return None
        count = len(hidden)
        rows = F.pad(hidden, (0, 0, 0, filled_up(count, self._fewest) - count))
        return self._decoder.output(rows)[:count].float()

    @torch.inference_mode()
    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~mtnlg.generation.runner.Runner`."""
        of, to = (torch.tensor(list(pages), device=self.device) for pages in (sources, targets))
        for pool in self._pools.values():
            pool.copy(of, to)

    def _apart(
        self,
        rows: Sequence[Row],
        counts: list[int],
        in_one_call: Callable[[Sequence[Row]], Tensor],
        otherwise: Callable[[Sequence[Row]], Tensor],
    ) -> Tensor:
        """In one call what can be, which is the usual step of a server: [counts together, size].

        Args:
            rows: of the step.
            counts: how much of the result is each row's.
            in_one_call: for rows without adapters.
            otherwise: for all.
        """
        plain = [self._own is None and row.adapter is None for row in rows]
        if self._native_step() is None or not any(plain) or not (all(plain) or self.is_invariant):
            return otherwise(rows)
        if all(plain):
            return in_one_call(rows)
        # Whoever has no adapter may not notice those who have.
        found: dict[int, Tensor] = {}
        for kind, run in ((True, in_one_call), (False, otherwise)):
            own = [number for number, is_plain in enumerate(plain) if is_plain == kind]
            parts = run([rows[number] for number in own]).split([counts[number] for number in own])
            found.update(zip(own, parts))
        return torch.cat([found[number] for number in range(len(rows))])

    def _native_step(self) -> NativeStep | None:
        if not self._native:
            is_there = self.kernel.is_native
            self._native.append(native_step(self._decoder, self._pools) if is_there else None)
        return self._native[0]

    def _logits_in_one_call(self, rows: Sequence[Row]) -> Tensor:
        step = self._native_step()
        assert step is not None
        return _cat([step(plan_tokens(some, self.page_size)) for some in cut_rows(rows, MOST_TOKENS)])

    def _hidden_in_one_call(self, rows: Sequence[Row]) -> Tensor:
        step = self._native_step()
        assert step is not None
        whole = [replace(row, num_logits=len(row.ids)) for row in rows]
        parts = cut_rows(whole, MOST_TOKENS)
        return _cat([step.hidden(plan_tokens(some, self.page_size)) for some in parts])

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """[logits of all rows, vocab]"""
        plan, hidden = self._hidden(rows)
        wanted = [
            place
            for row, own in zip(rows, plan.of_rows)
            for place in own[len(own) - row.num_logits :].tolist()
        ]
        if not wanted:
            return torch.empty(0, self.vocab_size, device=self.device)
        padded = wanted + [0] * (filled_up(len(wanted), self._fewest) - len(wanted))
        if self._mixer is not None:
            self._mixer.narrow(padded)
        last = self._decoder.norm(hidden[torch.tensor(padded, device=self.device)])
        return self._decoder.output(last)[: len(wanted)].float()

    def _normed(self, rows: Sequence[Row]) -> Tensor:
        """[tokens of all rows, hidden]"""
        plan, hidden = self._hidden(rows)
        places = torch.from_numpy(np.concatenate(plan.of_rows)).to(self.device)
        return self._decoder.norm(hidden)[places]

    def _hidden(self, rows: Sequence[Row]) -> tuple[StepPlan, Tensor]:
        rows = with_own(rows, self._own)
        plan = plan_step(rows, self.page_size, self._fewest, self.is_invariant, self.device)

        mixer = self._mix(rows, plan)
        scores = self._decoder.scores

        def attend(layer: int, projected: Tensor) -> Tensor:
            if mixer is not None:
                mixer.put_prefixes(layer, projected)
            return attend_rows(plan, self.kernel, self._pools[layer], projected, scores[layer])

        return plan, self._decoder.hidden(plan.ids, plan.positions, attend)

    def _mix(self, rows: Sequence[Row], plan: StepPlan) -> AdapterMixer | None:
        """Have the weights follow the rows' adapters."""
        if self._mixer is None and any(row.adapter is not None for row in rows):
            self._native_step()  # of the matrices as they are
            base = WholeBase(self.model)
            self._mixer = AdapterMixer(self._decoder, base, self.is_invariant)  # type: ignore[arg-type]
        if self._mixer is not None:
            self._mixer.lay_out(rows)
            self._mixer.begin(rows, plan)
        return self._mixer


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_rows(
    plan: StepPlan,
    kernel: AttentionKernel,
    pool: PagePool,
    projected: Tensor,
    scores: ScoredAttention | None = None,
) -> Tensor:
    """Attention of all new tokens of a step, each over its own sequence; their keys are filed first.

    A model over ranks (:mod:`~mtnlg.generation.stage_runner`) attends with it too.

    Args:
        plan: where they stand.
        kernel: for single tokens.
        pool: pages of the layer.
        projected: [tokens, (heads + 2 · key_value_heads) · head_dim]: queries, keys, values.
        scores: what the layer does with its scores besides; ``None`` is nothing.

    Returns:
        [tokens, heads · head_dim]
    """
    if scores is None and kernel.step is not None and len(plan.singles) == 1 and not plan.pieces:
        group, to = plan.singles[0], (plan.pages, plan.places)
        return kernel.step(projected, pool.keys, pool.values, *to, group.pages, group.lengths)
    heads, head_size = pool.keys.shape[1:3]
    parts = projected.unflatten(1, (-1, head_size))
    query, key, value = parts.split((parts.shape[1] - 2 * heads, heads, heads), dim=1)
    new = slice(0, plan.num_tokens)
    pool.write(key[new], value[new], plan.pages, plan.places)
    query = query.contiguous()
    grouped = query.unflatten(1, (heads, -1))  # [tokens, key_value_heads, queries, head_dim]
    context = torch.zeros_like(query)
    for group in plan.singles:
        mine = grouped[group.tokens], pool, group.pages, group.lengths
        found = kernel(*mine) if scores is None else attend_scored(scores, kernel.is_invariant, *mine)
        context[group.tokens] = found.flatten(1, 2)
    for piece in plan.pieces:
        context[piece.tokens] = attend_piece(piece, pool, query, key, value, scores)
    return context.flatten(1)


def attend_piece(
    piece: Piece,
    pool: PagePool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: ScoredAttention | None = None,
) -> Tensor:
    """Attention of many new tokens of one row.

    Args:
        piece: which.
        pool: pages of the layer, that hold their keys and values already.
        query: [tokens of the step, heads, head_dim].
        key: [tokens of the step, key_value_heads, head_dim].
        value: likewise.
        scores: see :func:`attend_rows`.

    Returns:
        [tokens of the piece, heads, head_dim]
    """
    if piece.start == 0:
        keys, values = (tensor[piece.tokens].transpose(0, 1) for tensor in (key, value))
    else:
        keys, values = pool.read(piece.pages, piece.end)
    queries = query[piece.tokens].transpose(0, 1)
    num_new = queries.shape[1]
    mask = None
    if piece.start:
        mask = torch.ones(num_new, piece.end, dtype=torch.bool, device=query.device).tril(piece.start)
    if scores is not None:
        seen = None if mask is None else mask[None, None]
        return scores(queries[None], keys[None], values[None], seen)[0].transpose(0, 1)
    found = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=queries.shape[0] != keys.shape[0],
    )
    return found[0].transpose(0, 1)

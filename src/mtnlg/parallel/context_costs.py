"""What sharing sequences costs each rank: bytes kept for the backward pass, and bytes sent.

Notation: T tokens of a rank (micro-batch x sequence / ranks), q and k the widths of its queries and keys
(heads x head_dim after tensor parallelism), e bytes of a number, n ranks that share a sequence.

- Ring (Liu et al. 2023, arXiv 2310.01889; dealt out as in Brandon et al. 2023, arXiv 2311.09431): keys
  and values take n - 1 steps in the forward pass, 2Tk numbers each, and again in the backward pass, where
  the sums of their gradients follow them in float32. What a rank sends does not shrink with n as long as
  nT grows with it, but it is sent while the previous block is computed.
- All-to-all (Jacobs et al. 2023, arXiv 2309.14509): queries, keys, values and outputs are sent once in
  either pass, and a rank keeps its own n-th: T(2q + 2k)(n - 1)/n numbers, which shrink with T = S/n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.parallel.all_to_all_attention import key_value_repeats

SUM_BYTES = 4  # gradients are added up, and log-sum-exps kept, in float32


@dataclass(frozen=True)
class ContextCosts:
    """Costs of one layer on one rank for one micro-batch, in bytes.

    Args:
        kept_by_attention: queries, keys, values, outputs and log-sum-exps, for the backward pass.
        kept: by the whole layer, without recomputation.
        kept_recomputing: by the whole layer with full recomputation: its input.
        sent_forward: to other ranks of the sequence in the forward pass (once more where the backward
            pass computes attention again).
        sent_backward: likewise in the backward pass.
        messages_forward: tensors sent.
        messages_backward: likewise.
    """

    kept_by_attention: int
    kept: int
    kept_recomputing: int
    sent_forward: int
    sent_backward: int
    messages_forward: int
    messages_backward: int


@dataclass(frozen=True)
class _Widths:
    """Sizes of one rank's part of a layer."""

    tokens: int
    heads: int
    key_value_heads: int
    head_size: int

    @property
    def numbers(self) -> int:
        """Numbers of queries and outputs, keys and values."""
        return 2 * self.tokens * (self.heads + self.key_value_heads) * self.head_size


def context_costs(
    model: MegatronModelConfig,
    layout: LayoutConfig,
    sequence_length: int,
    micro_batch_size: int = 1,
    number_bytes: int = 2,
) -> ContextCosts:
    """Costs of the context parallelism of ``layout``.

    Args:
        model: the architecture (of experts, a dense layer is counted).
        layout: its context and tensor sizes and ``context_parallel_method`` count.
        sequence_length: tokens of a whole sequence.
        micro_batch_size: sequences at once.
        number_bytes: of an activation: 2 in 16 bits, 4 in float32.
    """
    ranks, tensor = layout.context_parallel_size, layout.tensor_parallel_size
    widths = _Widths(
        micro_batch_size * sequence_length // ranks,
        model.num_attention_heads // tensor,
        max(1, model.key_value_heads // tensor),
        model.head_size,
    )
    sends = _ring if layout.context_parallel_method == "ring" else _all_to_all
    widths, sent, messages = sends(widths, ranks, number_bytes)
    attention = widths.numbers * number_bytes + widths.tokens * widths.heads * SUM_BYTES
    stream = widths.tokens * model.hidden_size // (tensor if layout.sequence_parallel else 1)
    return ContextCosts(
        kept_by_attention=attention,
        kept=attention + _kept_besides(model, widths.tokens, stream, tensor, number_bytes),
        kept_recomputing=stream * number_bytes,
        sent_forward=sent[0],
        sent_backward=sent[1],
        messages_forward=messages[0],
        messages_backward=messages[1],
    )


def tokens_that_hide_messages(
    model: MegatronModelConfig, flops_per_second: float, bytes_per_second: float, number_bytes: int = 2
) -> float:
    """Tokens of a rank from which on a step of the ring computes for as long as its message takes.

    A step multiplies half of the T x T pairs (2qT² operations a pass) while 2Tk numbers travel. For as
    many key/value heads as heads this is e F / B; Liu et al. (section 3) have F / B for blocks of which all
    pairs are seen and 16 bits.

    Args:
        model: the architecture.
        flops_per_second: that attention reaches.
        bytes_per_second: of the link to the next rank.
        number_bytes: of a number.
    """
    share = model.key_value_heads / model.num_attention_heads
    return number_bytes * share * flops_per_second / bytes_per_second


def _ring(
    widths: _Widths, ranks: int, number_bytes: int
) -> tuple[_Widths, tuple[int, int], tuple[int, int]]:
    keys = 2 * widths.tokens * widths.key_value_heads * widths.head_size
    steps = ranks - 1
    sent = steps * keys * number_bytes, steps * keys * (number_bytes + SUM_BYTES)
    return widths, sent, (steps, 2 * steps)


def _all_to_all(
    widths: _Widths, ranks: int, number_bytes: int
) -> tuple[_Widths, tuple[int, int], tuple[int, int]]:
    repeats = key_value_repeats(widths.key_value_heads, ranks)
    heads = widths.key_value_heads * repeats
    widths = _Widths(widths.tokens, widths.heads, heads, widths.head_size)
    sent = widths.numbers * number_bytes * (ranks - 1) // ranks
    return widths, (sent, sent), (2, 2)


def _kept_besides(
    model: MegatronModelConfig, tokens: int, stream: int, tensor: int, number_bytes: int
) -> int:
    """Bytes besides attention's own: for GPT 34sbh in all (Korthikanti et al. 2022, arXiv 2205.05198).

    Inputs and outputs of both norms, what the MLP multiplies, and a byte an element for either dropout.
    """
    wide = math.prod((tokens, model.ffn_size)) // tensor
    # Gate, its activation, up and their product; or up and its activation.
    matrices = 4 if model.is_gated else 2
    kept = (4 * stream + matrices * wide) * number_bytes
    return kept + 2 * stream * (model.hidden_dropout > 0.0)

"""Floating-point operations of training, by the formula of Narayanan et al. (arXiv 2104.04473).

For GPT with an MLP of ``4 * hidden`` the counts below are the paper's: with full recomputation
``96 B s l h² (1 + s / 6h + V / 16 l h)`` (its equation 3), without
``72 B s l h² (1 + s / 6h + V / 12 l h)``. Like the paper they count matrix products only, attention in
full (not halved for causality), and two operations for a multiply-add. Model FLOPs (for MFU) never
count recomputation; hardware FLOPs (for HFU) do (Chowdhery et al., arXiv 2204.02311, appendix B).

Below an adapter weights are frozen: a matrix is passed through twice, once each way, and its own gradient
is not computed. That is 4 operations for each of its weights and tokens instead of 6; the products of
attention have no weights and keep their two gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import EMBEDDING_TARGET, AdapterConfig
from mtnlg.config.moe import has_experts, mlp_weights
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.model.adapters import adapted_linears, put_adapter
from mtnlg.model.initialization import NoInitialization
from mtnlg.model.low_rank import low_rank_of


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass, per token.

    Args:
        linear: linear layers of all Transformer layers.
        attention: scores and weighted sums of all layers.
        head: output projection.
    """

    linear: float
    attention: float
    head: float


def forward_flops(
    config: MegatronModelConfig, sequence_length: int, target_length: int = 0
) -> ForwardFlops:
    """Operations per token of a forward pass over sequences of ``sequence_length`` tokens.

    Of an encoder-decoder, per token that its encoder reads; its decoder writes ``target_length`` for each
    ``sequence_length`` of them.
    """
    if config.has_encoder:
        return _pair_forward_flops(config, sequence_length, target_length)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_size
    key_value = config.key_value_heads * config.head_size
    attention_matrices = hidden * (2 * query + 2 * key_value) * layers
    is_projected = config.embedding_width != hidden  # once after the embedding, once before the head
    # Of experts, those that a token goes through; and the router.
    mlp_matrices = sum(mlp_weights(config, layer, active=True) for layer in range(layers))
    return ForwardFlops(
        linear=2.0 * (attention_matrices + mlp_matrices),
        attention=4.0 * query * sum(_keys_seen(config, layer, sequence_length) for layer in range(layers)),
        head=2.0 * config.embedding_width * (config.vocab_size + 2 * hidden * is_projected),
    )


def _pair_forward_flops(config: MegatronModelConfig, source: int, target: int) -> ForwardFlops:
    written = target / source  # for each token read
    query = config.num_attention_heads * config.head_size
    key_value = config.key_value_heads * config.head_size
    mlp = mlp_weights(config, 0, active=True)
    whole = config.hidden_size * (2 * query + 2 * key_value) + mlp
    reading = config.hidden_size * 2 * key_value  # keys and values that cross attention makes of the source
    asking = config.hidden_size * 2 * query
    encoder, decoder = config.num_hidden_layers, config.decoder_layers
    return ForwardFlops(
        linear=2.0 * (encoder * whole + decoder * (written * (whole + asking) + reading)),
        attention=4.0 * query * (encoder * source + decoder * written * (target + source)),
        head=2.0 * written * config.hidden_size * config.vocab_size,
    )


def _keys_seen(config: MegatronModelConfig, layer: int, sequence_length: int) -> int:
    """Keys that a layer's scores are computed for: those in its window, where it has one."""
    return min(sequence_length, config.window_of_layer(layer) or sequence_length)


def model_flops_per_token(
    config: MegatronModelConfig,
    sequence_length: int,
    target_length: int = 0,
    adapter: AdapterConfig | None = None,
) -> float:
    """Operations that training one token needs: the forward pass, and twice it for the backward.

    Args:
        config: the architecture.
        sequence_length: tokens of one sequence, without virtual ones.
        target_length: see :func:`forward_flops`.
        adapter: is trained alone. Its virtual tokens are work for those of the text.
    """
    if adapter is None:
        forward = forward_flops(config, sequence_length, target_length)
        return 3.0 * (forward.linear + forward.attention + forward.head)
    longest = sequence_length + adapter.num_positions
    forward = forward_flops(config, longest, target_length)
    passed = 2.0 * (forward.linear + forward.head) + 3.0 * forward.attention
    return (passed + 3.0 * update_flops(config, adapter)) * longest / sequence_length


def update_flops(config: MegatronModelConfig, adapter: AdapterConfig) -> float:
    """Operations of LoRA's matrices in a forward pass, per token that goes through a layer."""
    if adapter.method != "lora":
        return 0.0
    with torch.device("meta"), NoInitialization():
        model = (MegatronEncoderDecoder if config.has_encoder else MegatronLmDecoder)(config)
    put_adapter(cast(MegatronLmDecoder, model), adapter, inserts=False)
    total = 0
    for name, linear in adapted_linears(model):
        update = low_rank_of(linear)
        assert update is not None
        looked_up = name == EMBEDDING_TARGET  # what is looked up is not multiplied
        total += update.up.numel() + (0 if looked_up else update.down.numel())
    return 2.0 * total


def hardware_flops_per_token(
    config: MegatronModelConfig,
    sequence_length: int,
    recomputation: str = "none",
    operators: Collection[str] = (),
    target_length: int = 0,
    adapter: AdapterConfig | None = None,
) -> float:
    """Operations that training one token executes.

    Args:
        config: the architecture.
        sequence_length: tokens of one sequence.
        recomputation: ``training.activation_recomputation``. The head never is recomputed; what
            ``budget`` recomputes is decided later, and not counted.
        operators: ``training.recomputed_operators``, where ``recomputation`` is ``operators``.
        target_length: see :func:`forward_flops`.
        adapter: see :func:`model_flops_per_token`.
    """
    longest = sequence_length + (0 if adapter is None else adapter.num_positions)
    forward = forward_flops(config, longest, target_length)
    recomputed = {"selective": {"attention"}, "operators": set(operators)}.get(recomputation, set())
    again = 0.0
    if recomputation == "full":
        again = forward.linear + forward.attention
        again += 0.0 if adapter is None else update_flops(config, adapter)
    elif recomputed & {"attention", "linear"}:
        again = forward.attention
    if "linear" in recomputed:
        again += _first_matrices_flops(config, target_length / sequence_length)
    least = model_flops_per_token(config, sequence_length, target_length, adapter)
    return least + again * longest / sequence_length


def _first_matrices_flops(config: MegatronModelConfig, written: float) -> float:
    """Of the linear layers before attention and before the activation (of experts: none).

    ``written`` are tokens of the target for each token read, of an encoder-decoder.
    """
    heads = config.num_attention_heads + 2 * config.key_value_heads
    layers = config.num_hidden_layers
    if config.has_encoder:
        mine = heads * config.head_size + (2 if config.is_gated else 1) * config.ffn_size
        query, read = config.num_attention_heads, 2 * config.key_value_heads  # of cross attention
        crossing = config.head_size * (written * query + read)
        decoder = config.decoder_layers * (written * mine + crossing)
        return 2.0 * config.hidden_size * (layers * mine + decoder)
    dense = sum(not has_experts(config, layer) for layer in range(layers))
    columns = heads * config.head_size * layers + (2 if config.is_gated else 1) * config.ffn_size * dense
    return 2.0 * config.hidden_size * columns

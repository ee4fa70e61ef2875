"""Floating-point operations of training, by the formula of Narayanan et al. (arXiv 2104.04473).

For GPT with an MLP of ``4 * hidden`` the counts below are the paper's: with full recomputation
``96 B s l h² (1 + s / 6h + V / 16 l h)`` (its equation 3), without
``72 B s l h² (1 + s / 6h + V / 12 l h)``. Like the paper they count matrix products only, attention in
full (not halved for causality), and two operations for a multiply-add. Model FLOPs (for MFU) never
count recomputation; hardware FLOPs (for HFU) do (Chowdhery et al., arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config import MegatronModelConfig
from mtnlg.config.moe import mlp_weights


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


def forward_flops(config: MegatronModelConfig, sequence_length: int) -> ForwardFlops:
    """Operations per token of a forward pass over sequences of ``sequence_length`` tokens."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_size
    key_value = config.key_value_heads * config.head_size
    attention_matrices = hidden * (2 * query + 2 * key_value) * layers
    # Of experts, those that a token goes through; and the router.
    mlp_matrices = sum(mlp_weights(config, layer, active=True) for layer in range(layers))
    return ForwardFlops(
        linear=2.0 * (attention_matrices + mlp_matrices),
        attention=4.0 * sequence_length * query * layers,
        head=2.0 * hidden * config.vocab_size,
    )


def model_flops_per_token(config: MegatronModelConfig, sequence_length: int) -> float:
    """Operations that training one token needs: the forward pass, and twice it for the backward."""
    forward = forward_flops(config, sequence_length)
    return 3.0 * (forward.linear + forward.attention + forward.head)


def hardware_flops_per_token(
    config: MegatronModelConfig, sequence_length: int, recomputation: str = "none"
) -> float:
    """Operations that training one token executes.

    Args:
        config: the architecture.
        sequence_length: tokens of one sequence.
        recomputation: ``none``, ``selective`` (attention is run forward twice) or ``full`` (all layers
            are, the head is not).
    """
    forward = forward_flops(config, sequence_length)
    again = {
        "none": 0.0,
        "selective": forward.attention,
        "full": forward.linear + forward.attention,
    }[recomputation]
    return model_flops_per_token(config, sequence_length) + again

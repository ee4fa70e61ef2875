"""What is changed on each layer besides its division: activation recomputation and compilation."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from mtnlg.config import TrainingConfig
from mtnlg.model import DecoderLayer, MegatronLmDecoder


def recompute_activations(decoder: MegatronLmDecoder, switches: TrainingConfig) -> None:
    """Keep a block's input instead of its activations, and compute them again in the backward pass.

    Args:
        decoder: the model, or one stage of it.
        switches: ``activation_recomputation`` says what: ``none``; ``selective``, attention only, whose
            activations are large for their FLOPs (Korthikanti et al. 2022, arXiv 2205.05198);
            ``full``, whole layers.
    """
    what = switches.activation_recomputation
    if what == "none":
        return
    dropout = decoder.config.hidden_dropout > 0 or decoder.config.attention_dropout > 0
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        block = layer if what == "full" else layer.attention
        _recompute(block, keep_random_state=dropout)


def _recompute(block: nn.Module, keep_random_state: bool) -> None:
    # The forward of the instance is replaced instead of wrapping the module: names stay.
    block.forward = partial(  # type: ignore[method-assign]
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=keep_random_state
    )


def compile_layers(decoder: MegatronLmDecoder) -> None:
    """``torch.compile`` each layer by itself: one compilation serves all layers, and names stay."""
    for layer in decoder.layers.values():
        layer.compile()

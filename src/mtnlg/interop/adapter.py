"""An adapter as a value: what the tuner makes, PEFT files hold and the engine mixes in."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mtnlg.config.adapter import AdapterConfig


@dataclass(frozen=True)
class LowRank:
    """The update of one linear layer: ``W + scale * B A``, or with a magnitude DoRA's.

    Args:
        down: A, [rank, in].
        up: B, [out, rank].
        scale: what their product counts.
        magnitude: [out], DoRA's length of each row of the sum; ``None`` is plain LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """What is added to a model whose own weights stay as they are.

    Args:
        config: how it was made.
        base_fingerprint: of the model it belongs to; ``None`` where that was not recorded (files of
            others).
        low_rank: updates by the name of their linear layer (``layers.0.attention.query``).
        prompt: [num_virtual_tokens, hidden], embeddings put before the text.
        prefix: [layers, 2, key_value_heads, num_virtual_tokens, head_dim], keys and values that every
            token of the text sees.
    """

    config: AdapterConfig
    base_fingerprint: str | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    prompt: Tensor | None = None
    prefix: Tensor | None = None

"""The feed-forward block, plain (Vaswani et al. 2017) or gated (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig


def _squared_relu(values: Tensor) -> Tensor:
    return F.relu(values).square()


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": _squared_relu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "reglu": F.relu,
}


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where the activation is gated.

    Args:
        config: the architecture.
        ffn_size: width; ``None`` is the config's.
    """

    def __init__(self, config: MegatronModelConfig, ffn_size: int | None = None) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, ffn_size or config.ffn_size, config.mlp_bias
        self.activation = ACTIVATION_FUNCTIONS[config.activation_function]
        self.gate = nn.Linear(hidden, ffn, bias=bias) if config.is_gated else None
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        if self.gate is None:
            return self.down(self.activate(self.up(hidden)))
        return self.down(self.activate(self.up(hidden), self.gate(hidden)))

    def activate(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """act(up), or act(gate) · up: [batch, sequence, ffn] → [batch, sequence, ffn]"""
        return self.activation(up) if gate is None else self.activation(gate) * up

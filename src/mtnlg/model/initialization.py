"""Megatron's initialisation, each parameter from a random stream of its own.

A parameter's numbers depend on the seed and its name alone, so every layout, stage and rank can make
exactly the part it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mtnlg.config import MegatronModelConfig

_RESIDUAL_OUTPUTS = (
    "attention.output.weight",  # cross_attention's too
    "mlp.down.weight",
    "mlp.shared.down.weight",
    "mlp.experts.down",
)


class NoInitialization(TorchFunctionMode):
    """While this lasts, new modules keep their memory as it is, for weights that are loaded next.

    On the meta device, torch's own initialisation does nothing but import its compiler, for a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave out what ``torch.nn.init`` does."""
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def initial_std(name: str, config: MegatronModelConfig) -> float:
    """Standard deviation of the matrix ``name``.

    The projections that write into the residual stream (two of a layer, an expert's too) get
    ``std / sqrt(2 * layers)`` (Megatron-LM, following GPT-2) unless ``output_layer_init_method`` says
    otherwise. A layer of an encoder-decoder's decoder has three. Its attention does not divide by
    ``sqrt(head_dim)``, so the queries start that much smaller; where its head reads states divided by
    ``sqrt(hidden)``, the embedding starts that much larger (T5, arXiv 1910.10683).
    """
    if name.endswith(_RESIDUAL_OUTPUTS):
        if config.output_layer_init_method == "zeros":
            return 0.0
        if config.output_layer_init_method != "normal":
            return config.init_std / math.sqrt(_residual_outputs(name, config))
    if config.architecture == "encoder_decoder":
        if name.endswith("attention.query.weight"):
            return config.init_std / math.sqrt(config.head_size)
        if name == "embedding.tokens.weight" and config.scales_output:
            return config.init_std * math.sqrt(config.hidden_size)
    return config.init_std


def _residual_outputs(name: str, config: MegatronModelConfig) -> float:
    """Projections that write into the residual stream that ``name`` writes into."""
    if config.decoder_layers and int(name.split(".")[1]) >= config.num_hidden_layers:
        return 3.0 * config.decoder_layers
    return 2.0 * config.num_hidden_layers


def initial_value(name: str, shape: Sequence[int], config: MegatronModelConfig, seed: int) -> Tensor:
    """The whole initial value of one parameter, float32 on the CPU.

    Matrices of experts [experts, out, in] have a stream for each expert, so that the first experts stay
    what they are when others are added.

    Args:
        name: the parameter's full name in the whole model.
        shape: its whole shape.
        config: the architecture.
        seed: of the run.
    """
    if name.startswith("embedding.tokens.low_rank."):  # as PEFT: what is looked up is what begins as zeros
        return _normal(name, shape, 1.0 if name.endswith(".up") else 0.0, seed)
    if name.endswith((".bias", ".low_rank.up")):
        return torch.zeros(tuple(shape))
    if name.endswith(".low_rank.down"):
        return _uniform(name, shape, 1.0 / math.sqrt(shape[-1]), seed)
    if config.normalization == "rmsnorm_1p" and name.endswith("norm.weight"):
        return torch.zeros(tuple(shape))
    if len(shape) == 1:
        return torch.ones(tuple(shape))
    if len(shape) == 3:
        return torch.stack([initial_expert(name, n, shape[1:], config, seed) for n in range(shape[0])])
    return _normal(name, shape, initial_std(name, config), seed)


def initial_expert(
    name: str, expert: int, shape: Sequence[int], config: MegatronModelConfig, seed: int
) -> Tensor:
    """One expert's matrix [out, in] of the parameter ``name`` [experts, out, in]."""
    return _normal(f"{name}.{expert}", shape, initial_std(name, config), seed)


def _normal(name: str, shape: Sequence[int], std: float, seed: int) -> Tensor:
    """Numbers that depend on the name and the seed alone."""
    if std == 0.0:
        return torch.zeros(tuple(shape))
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=_stream(name, seed))


def _uniform(name: str, shape: Sequence[int], bound: float, seed: int) -> Tensor:
    """Likewise, between plus and minus ``bound``."""
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=_stream(name, seed))


def _stream(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize_weights(model: nn.Module, config: MegatronModelConfig, seed: int) -> None:
    """Fill every parameter of a plain ``model`` (not on meta) with its initial value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))

"""Which matrices of a model are quantized, and the exchange of its modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mtnlg.config.errors import CheckpointError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization.linear import QuantizedLinear
from mtnlg.quantization.numbers import quantize

CODE_NAMES = ("codes", "scales", "zeros", "order")
HEAD = "head.output"


def linears_to_quantize(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the model, by name; routers and embeddings are none."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module


def config_of(name: str, config: QuantizeConfig) -> QuantizeConfig | None:
    """How the linear layer ``name`` is kept; ``None`` is in floating point."""
    return config.for_head() if name.split(".")[0] == "head" else config


def quantize_model(model: nn.Module, config: QuantizeConfig) -> nn.Module:
    """Exchange the model's linear layers for quantized ones, rounded to the nearest, in place.

    A head that shares the embedding's matrix gets codes of its own; the embedding stays. Experts that are
    kept as one tensor for all stay as they are.

    Args:
        model: whole or a stage of it; on meta it gets shapes alone.
        config: the numbers.

    Returns:
        The same model.
    """
    for name, linear in list(linears_to_quantize(model)):
        own = config_of(name, config)
        if own is not None:
            set_module(model, name, QuantizedLinear.of(linear, own))
    return model


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def num_quantized(model: nn.Module) -> int:
    """Weights that are kept in few bits; a head beside a tied embedding holds none of its own."""
    config = getattr(model, "config", None)
    is_tied = getattr(config, "tie_word_embeddings", False)
    return sum(
        linear.in_features * linear.out_features
        for name, linear in quantized_linears(model).items()
        if not (is_tied and name == HEAD)
    )


def converted(name: str, tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """A tensor of a model's state on another device and in another dtype, which codes and scales keep."""
    is_of_codes = name.rpartition(".")[2] in CODE_NAMES
    return tensor.to(device=device, dtype=None if is_of_codes else dtype)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the model has ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def codes_of_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State for a quantized ``model`` from weights that are not quantized yet, or not all.

    Each quantized layer's matrix becomes codes, rounded to the nearest, one at a time and freeing the
    matrix; a head without a matrix of its own is the embedding's. Codes that are there stay, and where
    there are some, layers without are those that whoever quantized the model left in floating point: they
    become plain ones again.

    Args:
        model: as :func:`quantize_model` left it; may be on meta.
        weights: by name; emptied as it goes.

    Raises:
        CheckpointError: codes of another config than the model's.
    """
    state: dict[str, Tensor] = {}
    linears = quantized_linears(model)
    were_chosen = any(name.endswith(".codes") for name in weights)
    if HEAD in linears and not weights.keys() & {f"{HEAD}.codes", f"{HEAD}.weight"}:
        weights[f"{HEAD}.weight"] = weights["embedding.tokens.weight"]
    for name, linear in linears.items():
        weight = weights.pop(f"{name}.weight", None)
        if weight is None or f"{name}.codes" in weights:
            _check_codes(name, linear, weights)
            continue
        if were_chosen and name != HEAD:
            set_module(model, name, _plain(linear, weight))
            state[f"{name}.weight"] = weight
            continue
        linear.dtype = weight.dtype
        codes = QuantizedLinear(
            linear.in_features, linear.out_features, linear.config, device=weight.device
        )
        codes.set_codes(quantize(weight, linear.config))
        state |= {f"{name}.{key}": tensor for key, tensor in codes.state_dict().items()}
    return {**weights, **state}


def _plain(linear: QuantizedLinear, weight: Tensor) -> nn.Linear:
    """A layer in floating point in the place of a quantized one, without numbers yet."""
    made = nn.Linear(linear.in_features, linear.out_features, False, device="meta", dtype=weight.dtype)
    made.register_parameter("bias", linear.bias)
    return made.train(linear.training)


def _check_codes(name: str, linear: QuantizedLinear, weights: dict[str, Tensor]) -> None:
    if f"{name}.order" in weights:
        linear.order = torch.empty(linear.in_features, dtype=torch.int32, device=linear.codes.device)
    for key, expected in linear.state_dict().items():
        found = weights.get(f"{name}.{key}")
        if key in CODE_NAMES and found is not None and found.dtype != expected.dtype:
            raise CheckpointError(
                f"{name}.{key} has {found.dtype}, and {linear.config.weights} is kept in {expected.dtype}: "
                "the file was quantized in another way than its config says."
            )

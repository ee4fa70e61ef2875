"""Choosing codes by what the layers see of a user's text: layer after layer, each after those before it.

Inputs of a layer are those that the already rounded layers before it give, so that later layers make good
what earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config.errors import ConfigError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.model import MegatronLmDecoder
from mtnlg.quantization.awq import Scaling, scale_layer
from mtnlg.quantization.gptq import quantize_gptq
from mtnlg.quantization.linear import QuantizedLinear
from mtnlg.quantization.model import config_of, linears_to_quantize, quantize_model, set_module

METHODS = ("rtn", "gptq", "awq")
SAMPLE = 2048  # tokens over which AWQ compares outputs
Progress = Callable[[int, int], None]


@torch.no_grad()
def calibrate(
    model: MegatronLmDecoder,
    config: QuantizeConfig,
    method: str,
    batches: Sequence[Tensor],
    on_layer: Progress | None = None,
) -> MegatronLmDecoder:
    """Quantize a model in place by what its layers see of a text.

    Args:
        model: whole, in floating point; AWQ changes its norms too, without changing what it computes.
        config: the numbers.
        method: ``gptq``, ``awq``, or ``rtn``, which needs no text.
        batches: each ids [batch, sequence].
        on_layer: told how many layers of how many are done.

    Returns:
        The same model.

    Raises:
        ConfigError: the method is unknown, or there is no text.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}: choose one of {', '.join(METHODS)}.")
    if method == "rtn":
        quantize_model(model, config)
        return model
    if not sum(ids.numel() for ids in batches):
        raise ConfigError(f"method is {method!r}: it looks at text, and the calibration text is empty.")
    was_training = model.training
    model.eval()
    hidden, others = _first_inputs(model, batches)
    for done, (name, layer) in enumerate(model.layers.items()):
        calls = [(tensor, *own[name]) for tensor, own in zip(hidden, others)]
        _quantize_layer(layer, f"layers.{name}", config, method, calls)
        hidden = [layer(tensor, *rest, **named) for tensor, rest, named in calls]
        if on_layer is not None:
            on_layer(done + 1, len(model.layers))
    _quantize_head(model, config, method, hidden)
    return model.train(was_training)  # type: ignore[return-value]


Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


def _first_inputs(
    model: MegatronLmDecoder, batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """What the first layer gets of each batch, and what each layer gets beside it (masks, angles)."""
    first: list[Tensor] = []
    others: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not others[-1]:
                first.append(given[0])
            others[-1][name] = given[1:], named

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, layer in model.layers.items()
    ]
    last = torch.zeros(1, dtype=torch.long)
    for ids in batches:
        others.append({})
        model(ids, logits_at=last.expand(len(ids)))
    for handle in handles:
        handle.remove()
    return first, others


@contextmanager
def _seen(linears: dict[str, nn.Linear], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this lasts, ``look`` is shown the inputs [tokens, in] of each linear layer."""
    handles = [
        linear.register_forward_pre_hook(
            lambda module, given, name=name: look(name, given[0].detach().flatten(0, -2))
        )
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantize_layer(
    layer: nn.Module, prefix: str, config: QuantizeConfig, method: str, calls: Sequence[Call]
) -> None:
    linears = dict(linears_to_quantize(layer))
    if method == "awq":
        sample, rest, named = calls[0]
        run = lambda: layer(sample, *rest, **named)  # noqa: E731
        scale_layer(_scalings(layer, linears, run), config, run)
    moments = _second_moments(layer, linears, calls) if method == "gptq" else {}
    for name, linear in linears.items():
        own = config_of(f"{prefix}.{name}", config)
        if own is not None:
            set_module(layer, name, _chosen(linear, own, moments.get(name)))


def _second_moments(
    layer: nn.Module, linears: dict[str, nn.Linear], calls: Sequence[Call]
) -> dict[str, Tensor]:
    """Σ x xᵀ [in, in] of what each linear layer reads."""
    moments: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.float()
        moments[name] = moments[name] + rows.T @ rows if name in moments else rows.T @ rows

    with _seen(linears, add):
        for hidden, rest, named in calls:
            layer(hidden, *rest, **named)
    return moments


def _chosen(linear: nn.Linear, config: QuantizeConfig, moment: Tensor | None) -> QuantizedLinear:
    """The layer with codes; without a second moment each weight is rounded to the nearest."""
    made = QuantizedLinear.of(linear, config)
    if moment is not None:
        made.set_codes(quantize_gptq(linear.weight.detach(), moment, config))
    return made


def _quantize_head(
    model: MegatronLmDecoder, config: QuantizeConfig, method: str, hidden: Sequence[Tensor]
) -> None:
    head, own = model.head, config.for_head()
    if head is None or own is None or type(head.output) is not nn.Linear:
        return
    rows = torch.cat([head.norm(tensor).flatten(0, -2).float() for tensor in hidden])
    moment = rows.T @ rows if method == "gptq" else None
    head.output = _chosen(head.output, own, moment)  # type: ignore[assignment]


def _scalings(layer: nn.Module, linears: dict[str, nn.Linear], run: Callable[[], Tensor]) -> list[Scaling]:
    """Which matrices of a layer read what a norm, the values or a gate's partner made."""
    inputs: dict[str, Tensor] = {}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # outputs are held, so that their places stay theirs
    norms = [module for module in layer.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))]

    def note(module: nn.Module, given: Any, output: Tensor) -> None:
        made[output.data_ptr()] = module, output

    handles = [norm.register_forward_hook(note) for norm in norms]
    with _seen(linears, lambda name, rows: inputs.__setitem__(name, rows)):
        run()
    for handle in handles:
        handle.remove()
    found = []
    for norm in norms:
        readers = [name for name, rows in inputs.items() if made.get(rows.data_ptr(), (None,))[0] is norm]
        if readers:
            rows = inputs[readers[0]][:SAMPLE]
            found.append(Scaling(norm, [linears[name] for name in readers], rows))
    for maker, reader in (("attention.value", "attention.output"), ("mlp.up", "mlp.down")):
        fits = maker in linears and reader in inputs
        if fits and linears[maker].out_features == linears[reader].in_features:
            found.append(Scaling(linears[maker], [linears[reader]], inputs[reader][:SAMPLE]))
    return found

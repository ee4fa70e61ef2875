"""Putting what is trained beside a frozen model into it, and taking it out again.

The model itself knows nothing of it: modules are added to it and functions of it replaced, and no
parameter of its own changes its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config.adapter import ALL_LINEAR, EMBEDDING_TARGET, HEAD_TARGET, AdapterConfig
from mtnlg.config.adapter_rules import encoder_problems
from mtnlg.config.errors import ConfigError
from mtnlg.model.attention import Attention
from mtnlg.model.decoder import MegatronLmDecoder
from mtnlg.model.encoder_decoder import MegatronEncoderDecoder
from mtnlg.model.initialization import initial_value
from mtnlg.model.low_rank import (
    CHILD,
    LowRankUpdate,
    add_low_rank,
    add_low_rank_look_up,
    dense_weight,
    low_rank_of,
    merged_weight,
    remove_low_rank,
)
from mtnlg.model.virtual_tokens import (
    PrefixKeyValues,
    VirtualTokens,
    add_prefix,
    add_virtual_tokens,
    insert_virtual_source,
    insert_virtual_tokens,
    take_out_prefix,
    take_out_virtual_tokens,
)

PROMPT_NAME = "embedding.prompt.weight"
_ENDINGS = (f".{CHILD}.down", f".{CHILD}.up", f".{CHILD}.magnitude", ".prefix.key", ".prefix.value")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name in a decoder is an adapter's."""
    return name == PROMPT_NAME or name.endswith(_ENDINGS)


def is_of_virtual(name: str) -> bool:
    """Whether it is a virtual token's: an embedding, or keys and values of a prefix."""
    return name == PROMPT_NAME or ".prefix." in name


def put_adapter(decoder: MegatronLmDecoder, config: AdapterConfig, inserts: bool = True) -> None:
    """Add what ``config`` describes to ``decoder`` or a stage of it; the values come after.

    The decoder's own parameters are frozen; ``decoder.adapter`` is ``config`` from now on. New
    parameters have the dtype and the device of those beside them (float32 beside quantized ones).

    Args:
        decoder: whose weights stay as they are.
        config: the adapter.
        inserts: whether ``decoder(ids)`` puts virtual tokens among the ids by itself; whoever calls it
            with a cache does it in any case.

    Raises:
        ConfigError: the decoder has an adapter already, or none of the layers that are to get one.
    """
    if decoder.adapter is not None:
        raise ConfigError("the model has an adapter already: merge it or take it out first.")
    if decoder.config.has_encoder and (problems := encoder_problems(config)):
        raise ConfigError(problems)
    decoder.requires_grad_(False)
    if config.method == "lora":
        _put_low_rank(decoder, config)
    elif decoder.embedding is not None:
        _put_virtual_tokens(decoder, config)
    if config.method == "prefix":
        for layer in decoder.layers.values():
            attention = layer.get_submodule("attention")
            assert isinstance(attention, Attention)
            prefix = PrefixKeyValues(
                config.num_virtual_tokens,
                decoder.config.key_value_heads,
                decoder.config.head_size,
                **kind_beside(attention.key),
            )
            add_prefix(attention, prefix)
    decoder.adapter = config
    if inserts and isinstance(decoder, MegatronEncoderDecoder) and config.num_positions:
        insert_virtual_source(decoder, config)
    elif inserts and config.num_positions:
        insert_virtual_tokens(decoder, config)


def take_out_adapter(decoder: MegatronLmDecoder) -> None:
    """Leave ``decoder`` as it was before :func:`put_adapter`, frozen."""
    for name, linear in adapted_linears(decoder):
        remove_low_rank(linear)
        if name == HEAD_TARGET and decoder.head is not None:
            updated: Any = decoder.head.loss_function
            assert updated.func is _updated_loss, "something was put around it"
            decoder.head.loss_function = updated.args[1]
    if decoder.adapter is not None and decoder.adapter.method != "lora":
        if decoder.embedding is not None:
            take_out_virtual_tokens(decoder.embedding)
        for _, attention in prefixed(decoder):
            take_out_prefix(attention)
        decoder.__dict__.pop("forward", None)
    decoder.adapter = None


@contextmanager
def adapter_set_aside(decoder: MegatronLmDecoder) -> Iterator[None]:
    """The decoder as it is without the adapter in it, for the time being; the very same comes back."""
    if decoder.adapter is None:
        yield
        return
    config, read = decoder.adapter, decoder.__dict__.pop("forward", None)
    updates = [(linear, linear.forward, low_rank_of(linear)) for _, linear in adapted_linears(decoder)]
    prefixes = [(one, one.attention_function, one.get_submodule("prefix")) for _, one in prefixed(decoder)]
    embedding = decoder.embedding
    tokens = None if embedding is None else embedding.tokens
    look_up = None if tokens is None or config.method == "lora" else tokens.forward
    prompt = None if embedding is None else embedding._modules.get("prompt")
    loss = None if decoder.head is None else decoder.head.loss_function
    take_out_adapter(decoder)
    try:
        yield
    finally:
        decoder.adapter = config
        for linear, forward, update in updates:
            linear.add_module(CHILD, update)
            linear.forward = forward  # type: ignore[method-assign]
        for attention, function, prefix in prefixes:
            attention.add_module("prefix", prefix)
            attention.attention_function = function
        if loss is not None and decoder.head is not None:
            decoder.head.loss_function = loss
        if look_up is not None and tokens is not None:
            tokens.forward = look_up  # type: ignore[method-assign]
        if prompt is not None and embedding is not None:
            embedding.add_module("prompt", prompt)
        if read is not None:
            decoder.forward = read  # type: ignore[method-assign]


@torch.no_grad()
def merge_low_rank(decoder: MegatronLmDecoder) -> None:
    """Add LoRA's updates to the weights they belong to, and take them out.

    Raises:
        ConfigError: the adapter has virtual tokens, or the weights are quantized: neither can be merged.
    """
    config = decoder.adapter
    if config is None:
        return
    if config.method != "lora":
        raise ConfigError(
            f"an adapter of method {config.method} has no weights that could be merged: it goes as an "
            "adapter's folder, beside its model."
        )
    merged = {}
    for name, linear in adapted_linears(decoder):
        if hasattr(linear, "dequantize"):
            raise ConfigError(
                f"{name} is quantized: merge into the model that it was quantized from, and quantize again."
            )
        merged[name] = merged_weight(linear)
    take_out_adapter(decoder)
    if decoder.config.tie_word_embeddings and not merged.keys().isdisjoint((EMBEDDING_TARGET, HEAD_TARGET)):
        untie(decoder)
    for name, weight in merged.items():
        decoder.get_parameter(f"{name}.weight").copy_(weight)


def untie(decoder: MegatronLmDecoder) -> None:
    """Give the head a matrix of its own: an update of one of the two alone makes them differ."""
    decoder.config = replace(decoder.config, tie_word_embeddings=False)
    if decoder.head is not None:
        weight = decoder.head.output.weight
        decoder.head.output.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


def adapted_linears(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each linear layer with an update."""
    for name, module in list(decoder.named_modules()):
        if low_rank_of(module) is not None:
            yield name, module


def prefixed(decoder: MegatronLmDecoder) -> Iterator[tuple[int, Attention]]:
    """Number and attention of each layer with a prefix."""
    for index, layer in decoder.layers.items():
        attention = layer.get_submodule("attention")
        if isinstance(attention, Attention) and "prefix" in attention._modules:
            yield int(index), attention


def _put_low_rank(decoder: MegatronLmDecoder, config: AdapterConfig) -> None:
    for name, linear in _targets(decoder, config.target_modules).items():
        inputs, outputs = sizes_of(linear)
        options = (config.rank, config.scale, config.dropout, config.decomposed)
        put_update(decoder, name, LowRankUpdate(inputs, outputs, *options, **kind_beside(linear)))


def put_update(decoder: MegatronLmDecoder, name: str, update: LowRankUpdate) -> None:
    """Let the module ``name``, a linear layer or the table of embeddings, compute with ``update``."""
    module = decoder.get_submodule(name)
    if isinstance(module, nn.Embedding):
        add_low_rank_look_up(module, update)
        return
    add_low_rank(module, update)
    if name == HEAD_TARGET and decoder.head is not None:
        head = decoder.head
        head.loss_function = partial(_updated_loss, update, head.loss_function)


def _updated_loss(
    update: LowRankUpdate,
    loss: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    **options: Any,
) -> Tensor:
    return loss(*update.joined(hidden, weight), labels, **options)


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; of a table of embeddings, its rows and their width."""
    layer: Any = module
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return int(layer.in_features), int(layer.out_features)


def updatable(decoder: MegatronLmDecoder) -> dict[str, nn.Module]:
    """The modules of ``decoder`` or a stage of it that can have an update, by name."""
    found = {
        f"layers.{name}": module
        for name, module in decoder.layers.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    if decoder.embedding is not None:
        found[EMBEDDING_TARGET] = decoder.embedding.tokens
    if decoder.head is not None:
        found[HEAD_TARGET] = decoder.head.output
    return found


def _targets(decoder: MegatronLmDecoder, endings: list[str]) -> dict[str, nn.Module]:
    """The modules whose names end so."""
    modules, ends = updatable(decoder), (EMBEDDING_TARGET, HEAD_TARGET)
    wanted = {name for name in modules if _ends(name, endings)}
    if ALL_LINEAR in endings:
        wanted |= modules.keys() - set(ends)
    of_layers = [ending for ending in endings if ending not in (ALL_LINEAR, *ends)]
    missing = [ending for ending in of_layers if not any(_ends(name, [ending]) for name in modules)]
    if missing and len(decoder.layers):
        known = sorted({name.split(".", 2)[2] for name in modules if name not in ends} | set(ends))
        near = difflib.get_close_matches(missing[0], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"target_modules names {missing[0]}, and no linear layer's name ends so: there are "
            f"{', '.join(known)}, or {ALL_LINEAR} for all of the layers.{hint}"
        )
    return {name: module for name, module in modules.items() if name in wanted}


def _ends(name: str, endings: list[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _put_virtual_tokens(decoder: MegatronLmDecoder, config: AdapterConfig) -> None:
    embedding, architecture = decoder.embedding, decoder.config
    assert embedding is not None
    prompt = None
    if config.method == "prompt":
        prompt = VirtualTokens(
            architecture.vocab_size,
            config.num_virtual_tokens,
            embedding.tokens.embedding_dim,
            embedding.scale,
            **kind_beside(embedding.tokens),
        )
    add_virtual_tokens(embedding, prompt, architecture.vocab_size)


def kind_beside(beside: nn.Module) -> dict[str, Any]:
    """dtype and device for parameters beside a module."""
    tensors = [*beside.parameters(recurse=False), *beside.buffers(recurse=False)]
    first = tensors[0]
    return {
        "dtype": first.dtype if first.is_floating_point() and first.itemsize > 1 else torch.float32,
        "device": first.device,
    }


def first_tokens(config: AdapterConfig, vocab_size: int, seed: int, text_ids: Sequence[int]) -> list[int]:
    """The tokens whose embeddings virtual tokens begin as.

    Args:
        config: how many, and from how much of the vocabulary they are drawn.
        vocab_size: of the model.
        seed: of the draw.
        text_ids: of ``config.init_text``: repeated or cut; empty draws.
    """
    count = config.num_virtual_tokens
    if text_ids:
        return (list(text_ids) * -(-count // len(text_ids)))[:count]
    most = min(config.init_vocab_size or vocab_size, vocab_size)
    drawn = torch.randint(most, (count,), generator=torch.Generator().manual_seed(seed))
    return [int(token) for token in drawn]


@torch.no_grad()
def start_adapter(decoder: MegatronLmDecoder, seed: int = 1234, text_ids: Sequence[int] = ()) -> None:
    """Give the adapter in a whole plain ``decoder``, which has its weights, its first values.

    LoRA begins as no change, prompt tuning as tokens of the vocabulary, prefix tuning at random.

    Args:
        decoder: with an adapter.
        seed: of what is drawn.
        text_ids: of the adapter's ``init_text``.
    """
    for name, parameter in decoder.named_parameters():
        if is_of_adapter(name) and name != PROMPT_NAME:
            parameter.copy_(initial_value(name, parameter.shape, decoder.config, seed))
    for _, linear in adapted_linears(decoder):
        update = low_rank_of(linear)
        if update is not None and update.magnitude is not None:
            update.magnitude.copy_(torch.linalg.vector_norm(dense_weight(linear).float(), dim=1))
    embedding, config = decoder.embedding, decoder.adapter
    if config is not None and config.method == "prompt" and embedding is not None:
        tokens = first_tokens(config, decoder.config.vocab_size, seed, text_ids)
        rows = embedding.tokens.weight[tokens]
        scale = 1.0 if embedding.scale is None else rows.new_tensor(embedding.scale)
        embedding.get_parameter("prompt.weight").copy_(rows * scale)

"""An adapter's folder as a MODEL: its base, with what the adapter adds.

LoRA's updates are merged as weights are read, so whoever reads a MODEL (export, serving over ranks,
tuning further) reads the tuned one. Virtual tokens are no weights of the base: who knows of them takes
``base`` and ``adapter``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.adapter import EMBEDDING_TARGET, HEAD_TARGET
from mtnlg.interop.adapter import Adapter, LowRank
from mtnlg.interop.fingerprint import check_base, fingerprint
from mtnlg.interop.names import parameter_shapes
from mtnlg.interop.peft import read_adapter
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.t5_tokenizer import T5Tokenizer

if TYPE_CHECKING:
    from mtnlg.training.model_files import ModelFiles

EMBEDDING, HEAD = f"{EMBEDDING_TARGET}.weight", f"{HEAD_TARGET}.weight"
Cut = Callable[[str, Tensor], Tensor]


def with_adapter(base: ModelFiles, folder: Path) -> ModelFiles:
    """The model of an adapter's folder.

    Args:
        base: its base, which the first reading of weights is checked against.
        folder: of the adapter; a tokenizer that lies there is the model's.

    Raises:
        CheckpointError: the adapter does not fit the base's architecture.
    """
    adapter = read_adapter(folder, base.config)
    tokenizer = base.tokenizer
    if (folder / "tokenizer.json").is_file():
        kind = T5Tokenizer if base.config.has_encoder else Tokenizer
        tokenizer = kind.from_pretrained(folder)
    return replace(
        base,
        config=merged_config(base.config, adapter),
        tokenizer=tokenizer,
        read=partial(read_merged, base, adapter, str(folder)),
        stream=partial(stream_merged, base, adapter, str(folder)),
        adapter=adapter,
        base=base,
    )


def base_fingerprint(base: ModelFiles) -> str:
    """Of the weights of a MODEL, which are all read, one in memory at a time."""
    names = set(parameter_shapes(base.config)) - ({HEAD} if base.config.tie_word_embeddings else set())
    return fingerprint((name, tensor) for name, tensor in base.stream(frozenset(names)) if name in names)


def merged_config(config: MegatronModelConfig, adapter: Adapter) -> MegatronModelConfig:
    """Of the base with the adapter in its weights: what changes one of two tied matrices unties them."""
    return replace(config, tie_word_embeddings=False) if _unties(config, adapter) else config


def _unties(config: MegatronModelConfig, adapter: Adapter) -> bool:
    ends = (EMBEDDING_TARGET, HEAD_TARGET)
    return config.tie_word_embeddings and not adapter.low_rank.keys().isdisjoint(ends)


@torch.no_grad()
def merged(name: str, weight: Tensor, adapter: Adapter) -> Tensor:
    """The parameter ``name`` of the base with what the adapter adds to it."""
    one: LowRank | None = adapter.low_rank.get(name.removesuffix(".weight"))
    if one is None or not name.endswith(".weight"):
        return weight
    if name == EMBEDDING:  # [vocab, width]
        total = torch.addmm(weight.float(), one.down.float().t(), one.up.float().t(), alpha=one.scale)
        return total.to(weight.dtype)
    total = torch.addmm(weight.float(), one.up.float(), one.down.float(), alpha=one.scale)
    if one.magnitude is not None:
        total *= (one.magnitude.float() / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)


def read_merged(base: ModelFiles, adapter: Adapter, where: str) -> dict[str, Tensor]:
    """All weights of ``base`` with ``adapter`` in them; ``where`` is the adapter's name in errors."""
    _check(base, adapter, where)
    return {name: merged(name, tensor, adapter) for name, tensor in base.read().items()}


def stream_merged(
    base: ModelFiles, adapter: Adapter, where: str, names: Collection[str], cut: Cut | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The same for the weights of some names, one in memory at a time."""
    _check(base, adapter, where)
    changed = {name for name in names if name.removesuffix(".weight") in adapter.low_rank}
    sources = set(changed)
    if _unties(base.config, adapter):  # both come from the one matrix
        ends = {EMBEDDING, HEAD} & set(names)
        changed |= ends
        sources = (changed - ends) | ({EMBEDDING} if ends else set())
    for source, tensor in base.stream(frozenset(sources)):
        is_shared = source == EMBEDDING and _unties(base.config, adapter)
        for name in changed & ({EMBEDDING, HEAD} if is_shared else {source}):
            whole = merged(name, tensor, adapter)
            yield name, whole if cut is None else cut(name, whole)
    rest = frozenset(names) - changed
    yield from base.stream(rest) if cut is None else base.stream(rest, cut)


def _check(base: ModelFiles, adapter: Adapter, where: str) -> None:
    if adapter.config.num_positions:
        raise CheckpointError(
            f"{where}: an adapter of method {adapter.config.method} adds virtual tokens, which are no "
            "weights of the base: load it with MegatronLmModel.from_pretrained, or give the base and "
            "--adapter."
        )
    if adapter.base_fingerprint is not None:
        check_base(adapter.base_fingerprint, base_fingerprint(base), where)

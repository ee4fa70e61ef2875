"""Megatron's own opinion of its checkpoints: saves and loads them with ``megatron-core``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.interop.test_hugging_face import random_model
from tests.parallel.megatron_oracle import _megatron_of_size, build, in_megatron_order, part_of_rank

from mtnlg.interop.megatron_config import options_of_config


@contextmanager
def megatron(tensor_size: int) -> Iterator[int]:
    """Its global state, and what it asks of CUDA where there is none."""
    warnings.simplefilter("ignore")
    synchronize, stream = torch.cuda.synchronize, torch.cuda.Stream
    with _megatron_of_size(tensor_size) as rank:
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
        torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment, misc]
        try:
            yield rank
        finally:
            torch.cuda.synchronize, torch.cuda.Stream = synchronize, stream  # type: ignore[misc]


def save(folder: str, fields: dict[str, Any], tensor_size: int) -> None:
    """Save the weights of ``random_model`` as Megatron does."""
    from megatron.core import dist_checkpointing

    model = random_model(**fields)
    with megatron(tensor_size) as rank:
        theirs = build(model.config)
        parts = parts_of(model, rank, tensor_size)
        theirs.load_state_dict(parts, strict=False)
        options = options_of_config(model.config, "float32")
        options.activation_func = torch.nn.functional.gelu  # as real options hold functions
        saved = {"model": theirs.sharded_state_dict(), "args": options, "iteration": 3}
        dist_checkpointing.save(saved | {"checkpoint_version": 3.0}, folder)


def load(folder: str, fields: dict[str, Any], tensor_size: int) -> float:
    """Load into Megatron's model; the largest difference from the weights of ``random_model``."""
    from megatron.core import dist_checkpointing

    model = random_model(**fields)
    with megatron(tensor_size) as rank:
        theirs = build(model.config)
        wanted = {"model": theirs.sharded_state_dict()}
        loaded = dist_checkpointing.load(wanted, folder)
        assert isinstance(loaded["args"], argparse.Namespace)
        theirs.load_state_dict(loaded["model"])
        parts = parts_of(model, rank, tensor_size)
        return max(float((item - parts[name]).abs().max()) for name, item in theirs.named_parameters())


def logits(fields: dict[str, Any]) -> float:
    """The largest difference of Megatron's logits from those of ``random_model``."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # which it asks for, and has not where Transformer Engine is not
    model = random_model(**fields)
    ids = torch.randint(0, model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(11).expand_as(ids).contiguous()
    hidden_from = torch.ones(11, 11, dtype=torch.bool).triu(1)[None, None]
    with megatron(1), torch.no_grad():
        theirs = build(model.config).eval()
        theirs.load_state_dict(parts_of(model, 0, 1), strict=False)
        return float((theirs(ids, positions, hidden_from) - model(ids).logits).abs().max())


def parts_of(model: torch.nn.Module, rank: int, tensor_size: int) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    whole = in_megatron_order(tensors, model.config)
    return {
        name: part_of_rank(name, item.detach(), model.config, rank, tensor_size).contiguous()
        for name, item in whole.items()
    }


def make_folder(path: Path) -> str:
    path.mkdir(parents=True, exist_ok=True)
    return str(path)

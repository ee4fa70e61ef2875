"""How much memory keys and values take, and how many pages of them there may be."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.config.generation import GIB, EngineConfig

SHARE_OF_DEVICE = 0.25  # at most, where ``cache_gib`` says nothing
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container may use


def cache_bytes_per_token(config: MegatronModelConfig, element_bytes: float) -> int:
    """Bytes of one token's keys and values: 2 · layers · key-value heads · head size · element bytes.

    Of an encoder-decoder's layers, those of the decoder.
    """
    layers = config.decoder_layers or config.num_hidden_layers
    return round(2 * layers * config.key_value_heads * config.head_size * element_bytes)


def num_cache_pages(
    model: MegatronModelConfig,
    engine: EngineConfig,
    page_size: int,
    element_bytes: float,
    device: torch.device,
) -> int:
    """Pages that the engine's settings allow.

    Args:
        model: the architecture.
        engine: ``cache_gib`` is the budget; 0 is what ``max_batch_size`` requests of full length need,
            at most a quarter of the device's memory.
        page_size: tokens of a page.
        element_bytes: bytes of one number in the cache.
        device: where the cache is.

    Raises:
        ConfigError: the budget does not hold a single page.
    """
    page_bytes = page_size * cache_bytes_per_token(model, element_bytes)
    if engine.cache_gib > 0:
        num_pages = int(engine.cache_gib * GIB) // page_bytes
        if num_pages < 1:
            raise ConfigError(
                f"cache_gib is {engine.cache_gib}: one page of {page_size} tokens takes "
                f"{page_bytes / GIB:.3g} GiB in this model."
            )
        return num_pages
    per_request = -(-model.max_position_embeddings // page_size)
    affordable = int(device_memory(device) * SHARE_OF_DEVICE) // page_bytes
    return max(1, min(per_request * engine.max_batch_size, affordable))


def device_memory(device: torch.device) -> int:
    """Bytes of the device's memory, of a container's share where that is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory

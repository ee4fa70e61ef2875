"""Adapters of random numbers, large enough to change what is said."""

from __future__ import annotations

from typing import Any

import torch

from mtnlg.config.adapter import AdapterConfig
from mtnlg.interop.adapter import Adapter, LowRank
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import sizes_of

ALL = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"]
KINDS: dict[str, dict[str, Any]] = {
    "low-rank": dict(method="lora", rank=3, target_modules=["attention.query", "attention.value"]),
    "all": dict(method="lora", rank=2, alpha=5.0, target_modules=ALL, rank_stabilized=True),
    "everywhere": dict(method="lora", rank=2, target_modules=[*ALL, "embedding.tokens", "head.output"]),
    "dora": dict(method="lora", rank=4, target_modules=ALL, decomposed=True),
    "prompt": dict(method="prompt", num_virtual_tokens=5),
    "prompt-behind": dict(method="prompt", num_virtual_tokens=3, prompt_style="both"),
    "prefix": dict(method="prefix", num_virtual_tokens=7),
}


def make_adapter(model: MegatronLmDecoder, kind: str, seed: int = 0) -> Adapter:
    """An adapter of random numbers, large enough to change what is said."""
    config = AdapterConfig(**KINDS[kind])
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=random)  # noqa: E731
    size, count = model.config.hidden_size, config.num_virtual_tokens
    if config.method == "prompt":
        return Adapter(config, prompt=draw(count, size))
    if config.method == "prefix":
        heads, head_size = model.config.key_value_heads, model.config.head_size
        return Adapter(config, prefix=3 * draw(len(model.layers), 2, heads, count, head_size))
    low_rank = {}
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{ending}") for ending in config.target_modules):
            inputs, out = sizes_of(module)
            magnitude = 1 + draw(out).abs() if config.decomposed else None
            down, up = draw(config.rank, inputs), draw(out, config.rank)
            low_rank[name] = LowRank(down, up, config.scale, magnitude)
    return Adapter(config, low_rank=low_rank)

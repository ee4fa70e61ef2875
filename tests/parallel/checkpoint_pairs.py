"""Checkpoints saved in each layout and continued in each other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from tests.parallel import workers
from tests.parallel.parity import FAMILIES, SEVEN, layout_fields
from tests.parallel.test_checkpoints import assert_bit_equal, merged
from tests.ranks import RankPool


def checkpoint_pairs(pool: RankPool) -> Iterator[tuple[str, str, float]]:
    """Save in each layout, go on in each: the largest relative difference of the next loss."""
    model = {**FAMILIES["gpt"], "num_hidden_layers": 3}
    layouts = [(1, 1, 1), *SEVEN]
    with tempfile.TemporaryDirectory() as folder:
        for source in layouts:
            run = f"{folder}/{source}"
            first = _train(pool, model, source, run, 0)
            saved = merged(first)
            for target in layouts:
                results = _train(pool, model, target, run, 1)
                assert_bit_equal(results, saved)
                losses = [result["losses"][0] for result in results]
                if target == (1, 1, 1):
                    expected = losses[0]
                worst = max(abs(loss - expected) / expected for loss in losses)
                yield _name(source), _name(target), worst


def _train(pool: RankPool, model: dict[str, Any], sizes: tuple[int, ...], run: str, step: int) -> Any:
    args = (model, layout_fields(*sizes), {"name": "adamw"}, run, step, 1)
    return pool.run(int(np.prod(sizes)), workers.continue_training, *args, timeout=600.0)


def _name(sizes: tuple[int, ...]) -> str:
    named = zip(("tp", "pp", "dp"), sizes)
    return "x".join(f"{name}{size}" for name, size in named if size > 1) or "one process"

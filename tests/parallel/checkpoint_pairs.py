"""Checkpoints saved in each layout and continued in each other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from tests.parallel import workers
from tests.parallel.parity import FAMILIES
from tests.parallel.test_checkpoints import LAYOUTS, assert_bit_equal, merged, num_ranks
from tests.ranks import RankPool

DENSE = [name for name in LAYOUTS if "ep2" not in name and num_ranks(LAYOUTS[name]) <= 4]
EXPERTS = ["one process", "dp2 ep2", "tp2xdp2 ep2", "dp2 zero3", "pp2 zbv"]


def checkpoint_pairs(pool: RankPool) -> Iterator[tuple[str, str, float]]:
    """Save in each layout, go on in each: the largest relative difference of the next loss."""
    for family, names in (("gpt", ["tp2xpp2xdp2", *DENSE]), ("moe", EXPERTS)):
        # Few ranks come first: no more than two worlds of ranks are up at a time.
        names = sorted(names, key=lambda name: num_ranks(LAYOUTS[name]))
        model = {**FAMILIES[family], "num_hidden_layers": 4}
        with tempfile.TemporaryDirectory() as folder:
            for source in names:
                run = f"{folder}/{source}"
                saved = merged(_train(pool, model, source, run, 0))
                for target in names:
                    results = _train(pool, model, target, run, 1)
                    assert_bit_equal(results, saved)
                    losses = [result["losses"][0] for result in results]
                    if target == "one process":
                        expected = losses[0]
                    worst = max(abs(loss - expected) / expected for loss in losses)
                    prefix = "" if family == "gpt" else f"{family} "
                    yield prefix + source, prefix + target, worst


def _train(pool: RankPool, model: dict[str, Any], name: str, run: str, step: int) -> Any:
    args = (model, LAYOUTS[name], {"name": "adamw"}, run, step, 1)
    return pool.run(num_ranks(LAYOUTS[name]), workers.continue_training, *args, timeout=600.0)

"""A checkpoint of any layout continues in any other; tests/parallel/matrix.py tries every pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parallel import workers
from tests.parallel.parity import BOUND, FAMILIES, layout_fields
from tests.ranks import RankPool

ZERO3 = {"data_parallel_sharding": "zero3"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": layout_fields(1, 1, 1),
    "tp2xpp2xdp2": layout_fields(2, 2, 2),
    "dp2 zero3": layout_fields(1, 1, 2) | ZERO3,
    "tp2xpp2": layout_fields(2, 2, 1),
    "tp2xcp2": layout_fields(2, 1, 1, context=2),
    "pp2 zbv": layout_fields(1, 2, 1) | {"pipeline_schedule": "zbv"},
    "tp2xdp2 ddp": layout_fields(2, 1, 2) | {"data_parallel_sharding": "ddp"},
    "dp4 hybrid": layout_fields(1, 1, 4)
    | {"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 2},
    "cp2": layout_fields(1, 1, 1, context=2),
    "dp2 ep2": layout_fields(1, 1, 2, expert=2),
    "tp2xdp2 ep2": layout_fields(2, 1, 2, expert=2) | ZERO3,
    "pp2 interleaved": layout_fields(1, 2, 1) | {"pipeline_schedule": "interleaved_1f1b"},
    "tp2xdp2": layout_fields(2, 1, 2),
}
# Each layout is the source of one step and the destination of another.
CHAINS = {
    "gpt": ["one process", "tp2xpp2xdp2", "dp2 zero3", "tp2xcp2", "pp2 zbv", "tp2xdp2 ddp", "one process"],
    "llama": ["one process", "tp2xdp2", "pp2 interleaved", "dp4 hybrid", "cp2", "tp2xpp2", "one process"],
    "moe": ["one process", "dp2 ep2", "dp2 zero3", "tp2xdp2 ep2", "pp2 zbv", "one process"],
}


def num_ranks(layout: dict[str, Any]) -> int:
    sizes = [layout[f"{name}_parallel_size"] for name in ("tensor", "pipeline", "data", "context")]
    return int(np.prod(sizes))


@pytest.mark.parametrize(
    ("family", "tied", "optimizer"),
    [("gpt", True, "adamw"), ("llama", False, "muon"), ("moe", False, "adamw")],
)
def test_each_step_in_another_layout_is_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, family: str, tied: bool, optimizer: str
) -> None:
    model = {**FAMILIES[family], "tie_word_embeddings": tied, "num_hidden_layers": 5}
    fields, chain = {"name": optimizer}, CHAINS[family]
    args = (model, LAYOUTS["one process"], fields, str(tmp_path / "straight"), 0, len(chain))
    straight = ranks.run(1, workers.continue_training, *args)[0]
    saved: dict[str, Any] = {}
    for step, name in enumerate(chain):
        args = (model, LAYOUTS[name], fields, str(tmp_path / "chain"), step, 1)
        results = ranks.run(num_ranks(LAYOUTS[name]), workers.continue_training, *args)
        if step:
            assert_bit_equal(results, saved)
        saved = merged(results)
        for result in results:
            assert result["losses"][0] == pytest.approx(straight["losses"][step], rel=BOUND), name
            assert result["norms"][0] == pytest.approx(straight["norms"][step], rel=10 * BOUND), name


def assert_bit_equal(results: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """What the ranks have loaded is what was saved, and all of it."""
    seen = set()
    for result in results:
        for name, value in result["loaded"].items():
            assert np.array_equal(value, saved[name]), name
            seen.add(name)
    assert seen == set(saved)


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' saved tensors; those that several hold (tied copies, replicas) must be bit-equal."""
    together: dict[str, Any] = {}
    for result in results:
        for name, value in result["saved"].items():
            assert np.array_equal(together.setdefault(name, value), value), name
    return together

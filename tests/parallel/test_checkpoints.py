"""A checkpoint of any layout continues in any other; tests/parallel/matrix.py tries every pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parallel import workers
from tests.parallel.parity import BOUND, FAMILIES, layout_fields
from tests.ranks import RankPool

# Each layout is the source of one step and the destination of another.
CHAIN = [(1, 1, 1), (2, 2, 2), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize(
    ("family", "tied", "optimizer"), [("gpt", True, "adamw"), ("llama", False, "muon")]
)
def test_each_step_in_another_layout_is_the_run_of_one_process(
    ranks: RankPool, tmp_path: Path, family: str, tied: bool, optimizer: str
) -> None:
    model = {**FAMILIES[family], "tie_word_embeddings": tied}
    fields = {"name": optimizer}
    straight = ranks.run(
        1,
        workers.continue_training,
        model,
        layout_fields(1, 1, 1),
        fields,
        str(tmp_path / "straight"),
        0,
        len(CHAIN),
    )[0]
    saved: dict[str, Any] = {}
    for step, sizes in enumerate(CHAIN):
        args = (model, layout_fields(*sizes), fields, str(tmp_path / "chain"), step, 1)
        results = ranks.run(int(np.prod(sizes)), workers.continue_training, *args)
        if step:
            assert_bit_equal(results, saved)
        saved = merged(results)
        for result in results:
            assert result["losses"][0] == pytest.approx(straight["losses"][step], rel=BOUND)
            assert result["norms"][0] == pytest.approx(straight["norms"][step], rel=10 * BOUND)


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

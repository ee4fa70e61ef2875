"""A server that meets every number of rows makes few programs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.linears import FEWEST_ROWS, PackedLinear, can_pack
from mtnlg.generation.row_counts import EXACT, PER_DOUBLING, filled_up
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.model import MegatronLmDecoder

MakeModel = Callable[..., MegatronLmDecoder]
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "mlp_bias": False}


def test_rows_are_filled_up_to_few_numbers_and_by_little() -> None:
    numbers = range(1, 1025)
    filled = [filled_up(count, FEWEST_ROWS) for count in numbers]
    assert all(number >= count for number, count in zip(filled, numbers))
    assert filled[:EXACT] == [max(FEWEST_ROWS, count) for count in numbers[:EXACT]]
    assert all(
        number - count < count / PER_DOUBLING for number, count in zip(filled[EXACT:], numbers[EXACT:])
    )
    assert len(set(filled)) <= EXACT + PER_DOUBLING * 6  # six doublings
    assert all(filled_up(2**power, FEWEST_ROWS) == 2**power for power in range(2, 12))


def test_where_programs_do_not_depend_on_the_number_nothing_is_filled_up() -> None:
    assert [filled_up(count, 1) for count in (1, 2, 17, 255, 257)] == [1, 2, 17, 255, 257]


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="needs oneDNN")
@pytest.mark.parametrize("fields", [{}, EXPERTS])
def test_products_meet_few_numbers_of_rows(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    model = make_model(**fields).eval()
    met: set[int] = set()
    product = PackedLinear.__call__

    def watched(self: PackedLinear, rows: Tensor, *others: Any, **named: Any) -> Tensor:
        met.add(rows.shape[0])
        return product(self, rows, *others, **named)

    fast, plain = FastRunner(model, num_pages=64), PlainRunner(model, num_pages=64)
    monkeypatch.setattr(PackedLinear, "__call__", watched)
    length = model.config.max_position_embeddings
    for count in range(5, length, 3):
        whole = Row([number % 50 for number in range(count)], 0, list(range(16)), count)
        alone = [Row([number], 0, [20 + number % 40], 1) for number in range(count % 40)]
        rows = [whole, *alone]
        found, expected = fast.run(rows), plain.run(rows)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-4)
    assert met <= {filled_up(count, FEWEST_ROWS) for count in range(1, 2 * length)}

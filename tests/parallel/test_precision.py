"""Masters, loss scales and 8-bit products over ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from tests.parallel import data_workers as workers
from tests.ranks import RankPool

from mtnlg.config import ConfigError, PrecisionConfig
from mtnlg.parallel import float8

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2, "data_parallel_size": 1},
    "pp2": {"pipeline_parallel_size": 2, "data_parallel_size": 1},
    "dp2 zero1": {"data_parallel_size": 2},
    "dp2 zero3": {"data_parallel_size": 2, "data_parallel_sharding": "zero3"},
    "pp2 zbv": {
        "pipeline_parallel_size": 2,
        "data_parallel_size": 1,
        "pipeline_schedule": "zbv",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_too_small_for_bf16_is_not_lost(ranks: RankPool, name: str) -> None:
    for rank in ranks.run(2, workers.small_steps, LAYOUTS[name], {"dtype": "bf16"}):
        assert rank["masters"] == {1.0 + 2.0**-6}
        assert rank["gradients"] == {"torch.float32"}
        if name != "dp2 zero3":  # there they exist in bf16 only while a layer runs
            assert rank["working"] == {("torch.bfloat16", 1.0 + 2.0**-6)}


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2 zero1", "dp2 zero3"])
def test_an_overflow_on_one_rank_makes_all_skip_the_step(ranks: RankPool, name: str) -> None:
    expected = [(True, 256.0, True), (False, 128.0, False), (True, 128.0, True), (True, 256.0, True), True]
    assert ranks.run(2, workers.overflow_on_one_rank, LAYOUTS[name], 1) == [expected] * 2


needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (the extra fp8)"
)


@needs_torchao
@pytest.mark.parametrize("name", ["1", "tp2", "dp2 zero3"])
def test_8_bit_products_are_near_those_of_16_bits_and_change_no_name(ranks: RankPool, name: str) -> None:
    layout = LAYOUTS.get(name, {"data_parallel_size": 1})
    size = 1 if name == "1" else 2
    plain = ranks.run(1, workers.float8_step, {"data_parallel_size": 1}, False)[0]
    largest = max(np.abs(gradient).max() for gradient in plain["gradients"].values())
    for rank in ranks.run(size, workers.float8_step, layout, True):
        assert rank["weights"].keys() == plain["weights"].keys()
        for key, weight in plain["weights"].items():
            assert np.array_equal(rank["weights"][key], weight)
        assert rank["loss"] == pytest.approx(plain["loss"], rel=0.02)
        difference = max(
            np.abs(rank["gradients"][key] - gradient).max() for key, gradient in plain["gradients"].items()
        )
        assert 1e-3 < difference / largest < 0.2


def test_8_bit_products_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = PrecisionConfig("bf16", fp8=True)
    with pytest.raises(ConfigError, match="the CPU has no 8-bit matrix units"):
        float8.check_float8(precision, "cpu")
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(float8.torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ConfigError, match=r"A100 has compute capability 8\.0"):
        float8.check_float8(precision, "cuda")
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mtnlg\[fp8\]"):
        float8.check_float8(precision, "cuda")
    float8.check_float8(PrecisionConfig("bf16"), "cpu")

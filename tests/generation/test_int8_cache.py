"""Keys and values in 8 bits: nearly the same numbers, in a quarter of the memory."""

from __future__ import annotations

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.int8_pages import Int8PagePool
from mtnlg.generation.paged_attention import PagePool
from mtnlg.generation.runner import Row


def make(**fields):
    config = MegatronModelConfig(
        vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, init_method_std=0.15, position_embedding="rotary", **fields,
    )  # fmt: skip
    return MegatronLmModel(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_give_back_what_was_filed_to_a_254th(dtype):
    pool = Int8PagePool(5, 4, 3, 16, dtype, torch.device("cpu"))
    keys, values = torch.randn(2, 6, 3, 16).to(dtype).unbind()
    pages, places = torch.tensor([4, 4, 4, 4, 2, 2]), torch.tensor([0, 1, 2, 3, 0, 1])
    pool.write(keys, values, pages, places)
    for filed, held in zip((keys, values), pool.read(torch.tensor([4, 2]), 6)):
        filed = filed.float().transpose(0, 1)
        step = filed.abs().amax(-1, keepdim=True) / 127
        slack = 0.51 if dtype == torch.float32 else 1.1  # bf16 rounds what is read
        assert held.dtype == dtype and ((held.float() - filed).abs() <= step * slack).all()
    pool.copy(torch.tensor([4]), torch.tensor([1]))
    again = pool.read(torch.tensor([1, 2]), 6)
    assert all(torch.equal(a, b) for a, b in zip(again, pool.read(torch.tensor([4, 2]), 6)))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fields", [{}, dict(num_key_value_heads=2)], ids=["mha", "gqa"])
def test_the_logits_are_nearly_those_of_the_whole_cache(fields, deterministic):
    model = make(**fields)
    exact = FastRunner(model, 8, deterministic=deterministic)
    small = FastRunner(model, 8, deterministic=deterministic, has_int8_cache=True)
    steps = [
        [Row([*range(1, 20)], 0, [0, 3], 1), Row([5, 2], 0, [1], 1)],
        [Row([8], 19, [0, 3]), Row([6], 2, [1])],
        [Row([11, 7, 9], 20, [0, 3], 3)],
    ]
    for rows in steps:
        expected, found = exact.run(rows), small.run(rows)
        assert float((found - expected).norm() / expected.norm()) < 0.03
    assert not torch.equal(expected, found)


def test_the_same_memory_holds_more_tokens():
    model = make()
    whole = make_runner(model, EngineConfig(cache_gib=0.001))
    small = make_runner(model, EngineConfig(cache_gib=0.001, cache_dtype="int8"))
    assert small.num_pages / whole.num_pages == pytest.approx(
        4 / 1.25, rel=0.02
    )  # heads of 16: a scale each

    def held(runner):
        pool = runner._pools[0]
        if type(pool) is PagePool:
            return pool.keys.nbytes
        return pool.keys.codes.nbytes + pool.keys.scales.nbytes

    assert held(small) <= 1.02 * held(whole)


def test_answers_through_the_engine():
    model = make()
    expected = make().generate([3, 1, 4, 1, 5], max_new_tokens=6)
    model.engine_config = EngineConfig(cache_dtype="int8")
    found = model.generate([3, 1, 4, 1, 5], max_new_tokens=6)
    assert len(found) == 11 and found[:6] == expected[:6]


def test_where_it_cannot_be_is_said():
    model = make()
    model.make_runner = lambda config: None
    with pytest.raises(ConfigError, match=r"cache_dtype is 'int8'.*over ranks"):
        make_runner(model, EngineConfig(cache_dtype="int8"))
    with pytest.raises(ConfigError, match=r"cache_dtype is 'fp8': choose one of auto, int8"):
        EngineConfig(cache_dtype="fp8")

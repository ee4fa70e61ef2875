"""Generation over tensor- and pipeline-parallel ranks gives the tokens of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.generation import rank_workers as workers
from tests.ranks import RankPool

from mtnlg.config.adapter import AdapterConfig
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.rank_messages import pack_rows, unpack_rows
from mtnlg.generation.runner import Row
from mtnlg.interop.adapter import Adapter

GPT: dict[str, Any] = dict(
    vocab_size=67,  # does not divide
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=48,
    init_method_std=0.3,
)
LLAMA = GPT | dict(
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    qk_normalization=True,
    num_key_value_heads=1,  # fewer than ranks
    tie_word_embeddings=False,
)
EXPERTS = LLAMA | dict(
    num_experts=4, num_experts_per_token=2, moe_intermediate_size=24, num_shared_experts=1
)
PAIR = GPT | dict(
    architecture="encoder_decoder",
    num_decoder_layers=2,
    position_embedding="relative",
    normalization="rmsnorm",
    attention_bias=False,
    mlp_bias=False,
)
FAMILIES = {"gpt": GPT, "llama": LLAMA, "experts": EXPERTS, "pair": PAIR}
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2 x pp2": (2, 2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_give_the_tokens_of_one_process(ranks: RankPool, family: str, layout: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    engine = dict(prefill_chunk=16, max_batch_size=3)
    found = ranks.run(tensor * pipeline, workers.generate, FAMILIES[family], tensor, pipeline, engine)
    assert found[0] == workers.expected(FAMILIES[family], engine)
    assert found[1:] == [None] * (tensor * pipeline - 1)


def test_tokens_one_row_at_a_time_are_the_same(ranks: RankPool) -> None:
    engine = dict(deterministic=True)
    assert ranks.run(2, workers.generate, GPT, 2, 1, engine)[0] == workers.expected(GPT, engine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_give_logits_and_hidden_states_of_rows(ranks: RankPool, layout: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    found = ranks.run(tensor * pipeline, workers.logits_and_hidden, LLAMA, tensor, pipeline)[0]
    for ours, plain in zip(found, workers.plain_steps(LLAMA), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)


@pytest.mark.parametrize(
    ("layout", "family"), [("tp2", "gpt"), ("tp2", "experts"), ("pp2", "gpt"), ("tp2 x pp2", "llama")]
)
def test_ranks_mix_adapters_like_one_process(ranks: RankPool, layout: str, family: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    engine = dict(prefill_chunk=16, max_batch_size=4)
    found = ranks.run(tensor * pipeline, workers.generate_mixed, FAMILIES[family], tensor, pipeline, engine)
    assert found[0] == workers.expected_mixed(FAMILIES[family], engine)


def test_rows_travel_as_numbers() -> None:
    adapter = LoadedAdapter("poet", 3, Adapter(AdapterConfig()))
    rows = [Row([1, 2], 3, [4, 5, 6], 2), Row([7], 0, [8], 0, adapter=adapter)]
    assert unpack_rows(pack_rows(rows), {3: adapter}) == rows

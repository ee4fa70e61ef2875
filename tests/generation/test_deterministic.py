"""With ``deterministic``, what a request gets depends on nothing but the request: bit for bit."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, Generation, GenerationRequest, SamplingRules
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.runner import PAGE_SIZE, PlainRunner, Runner
from mtnlg.model import MegatronLmDecoder, initialize_weights

LONGEST = 200


@cache
def model() -> MegatronLmDecoder:
    config = MegatronModelConfig(
        vocab_size=67,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        init_method_std=0.3,
    )
    decoder = MegatronLmDecoder(config)
    initialize_weights(decoder, config, seed=3)
    return decoder.eval()


def make(kind: str, config: EngineConfig, num_pages: int) -> Runner:
    if kind == "plain":
        return PlainRunner(model(), num_pages)
    runner = make_runner(model(), config)
    return runner


@cache
def requests() -> list[GenerationRequest]:
    """Prompts of all lengths, some of which begin alike, greedy and seeded."""
    rng = random.Random(1)
    text = [rng.randrange(67) for _ in range(LONGEST)]
    found = []
    for number in range(14):
        shared = rng.choice([0, 0, 16, 64, 70, 128, 150])
        prompt = text[:shared] + [rng.randrange(67) for _ in range(rng.randrange(1, 40))]
        rules = SamplingRules(temperature=rng.choice([0.0, 1.0]), top_p=0.9, seed=number // 2)
        found.append(
            GenerationRequest(
                prompt, rules, max_new_tokens=rng.randrange(1, 20), logprobs=1, stream=number % 2
            )
        )
    return found


def answer(generation: Generation) -> tuple[list[int], list[object]]:
    return generation.new_ids, [score.logprob for score in generation.logprobs]


@cache
def alone(kind: str) -> list[tuple[list[int], list[object]]]:
    found = []
    for request in requests():
        config = EngineConfig(deterministic=True, prefix_cache=False, compile="off")
        engine = Engine(model(), config=config, runner=make(kind, config, 14))
        found.append(answer(engine.submit(request).result()))
    return found


@pytest.mark.parametrize("kind", ["plain", "made"])
@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(14)),
    steps_between=st.lists(st.integers(0, 3), min_size=14, max_size=14),
    batch_size=st.integers(1, 14),
    chunk=st.sampled_from([1, 30, 64, 500]),
    prefix_cache=st.booleans(),
    num_pages=st.sampled_from([-(-LONGEST // PAGE_SIZE), 24, 200]),
)
def test_identical_requests_give_identical_tokens(
    kind, order, steps_between, batch_size, chunk, prefix_cache, num_pages
):
    config = EngineConfig(
        max_batch_size=batch_size,
        prefill_chunk=chunk,
        prefix_cache=prefix_cache,
        deterministic=True,
        compile="off",
    )
    engine = Engine(model(), config=config, runner=make(kind, config, num_pages))
    found = {}
    for number, count in zip(order, steps_between):
        found[number] = engine.submit(requests()[number])
        for _ in range(count):
            engine.step()
    for number, generation in found.items():
        assert answer(generation.result()) == alone(kind)[number]
    assert engine.statistics.cache_tokens == 0


def test_the_numbers_do_depend_on_the_company_otherwise():
    """So that the test above tests something: the last bits of the scores move with the chunks."""
    seen = set()
    with torch.inference_mode():
        for chunk in (1, 7, 500):
            config = EngineConfig(prefill_chunk=chunk)
            engine = Engine(model(), config=config, runner=PlainRunner(model(), 200))
            found = [engine.submit(request) for request in requests()]
            seen.add(tuple(tuple(answer(generation.result())[1]) for generation in found))
    assert len(seen) > 1

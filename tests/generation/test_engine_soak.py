"""Thousands of requests that come, go, are cancelled, run out of time: all end, all memory comes back."""

from __future__ import annotations

import random
import threading

import pytest

from mtnlg.config import ConfigError
from mtnlg.config.errors import MtnlgError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, Generation, GenerationRequest, QueueFullError, SamplingRules
from mtnlg.generation.runner import PlainRunner, Row

REASONS = {"end", "stop", "length", "cancelled", "deadline", "error"}


class Unreliable(PlainRunner):
    """Answers at once with numbers that depend on the tokens alone, and fails now and then."""

    def __init__(self, model, num_pages: int, rng: random.Random) -> None:
        super().__init__(model, num_pages)
        self._rng = rng
        self._table = model.embedding.tokens.weight.detach().clone() @ model.head.output.weight.detach().T

    def run(self, rows):
        if self._rng.random() < 0.002:
            raise RuntimeError("the device is out of memory")
        for row in rows:
            check(row, self.page_size)
        wanted = [token for row in rows for token in list(row.ids)[len(row.ids) - row.num_logits :]]
        return self._table[wanted].clone()


def check(row: Row, page_size: int) -> None:
    assert len(row.ids) > 0 and 0 <= row.num_logits <= len(row.ids)
    assert len(row.pages) * page_size >= row.start + len(row.ids)
    assert len(set(row.pages)) == len(row.pages)


def random_request(rng: random.Random, beginnings: list[list[int]]) -> GenerationRequest:
    prompt = [*rng.choice(beginnings)[: rng.randrange(30)], rng.randrange(67)]
    return GenerationRequest(
        prompt,
        SamplingRules(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(5)),
        max_new_tokens=rng.choice([1, 2, 5, 20, 40]),
        end_ids=[rng.randrange(67)],
        stop=rng.choice([[], ["ab"], ["a", "zz"]]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
        logprobs=rng.choice([None, None, 1]),
        deadline_seconds=rng.choice([None, None, None, 0.02]),
    )


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in ids)


@pytest.fixture
def engine(make_model) -> Engine:
    config = EngineConfig(max_batch_size=6, max_queue_size=30, prefill_chunk=16)
    model = make_model()
    return Engine(model, decode, config, Unreliable(model, 8, random.Random(1)))


def check_nothing_is_lost(engine: Engine, found: list[Generation]) -> None:
    assert {generation.finish_reason for generation in found} <= REASONS
    assert engine.statistics.finished == len(found) == sum(engine.statistics.finish_reasons.values())
    assert engine.statistics.running == engine.statistics.waiting == engine.statistics.cache_tokens == 0
    books = engine._scheduler.books
    assert books.num_free == books.num_pages
    assert not engine._entries and not engine._given_up and engine._num_present == 0


@pytest.mark.filterwarnings("ignore")
def test_no_request_and_no_page_is_lost(engine, caplog):
    caplog.set_level("CRITICAL")
    rng = random.Random(2)
    beginnings = [[rng.randrange(67) for _ in range(30)] for _ in range(4)]
    found: list[Generation] = []
    refused = 0
    while len(found) < 2500:
        for _ in range(rng.randrange(4)):
            try:
                found.append(engine.submit(random_request(rng, beginnings)))
            except QueueFullError:
                refused += 1
        if rng.random() < 0.3 and found:
            rng.choice(found[-20:]).cancel()
        if rng.random() < 0.01:
            engine.forget()
        engine.step()
    while engine.step():
        pass
    check_nothing_is_lost(engine, found)
    reasons = engine.statistics.finish_reasons
    assert {"end", "stop", "length", "cancelled", "error"} <= set(reasons)
    assert refused > 0 and engine.statistics.preempted > 0 and engine.statistics.cached_tokens > 0


def test_many_threads_lose_nothing(engine, caplog):
    caplog.set_level("CRITICAL")
    found: list[Generation] = []
    wrong: list[BaseException] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        beginnings = [[rng.randrange(67) for _ in range(30)] for _ in range(2)]
        try:
            for _ in range(60):
                ask(rng, beginnings)
        except BaseException as error:
            wrong.append(error)
            raise

    def ask(rng: random.Random, beginnings: list[list[int]]) -> None:
        try:
            if rng.random() < 0.05:
                with pytest.raises(ConfigError):
                    engine.submit(GenerationRequest([]))
            generation = engine.submit(random_request(rng, beginnings))
        except QueueFullError:
            return
        found.append(generation)
        if rng.random() < 0.2:
            generation.cancel()
        if rng.random() < 0.1:
            generation.listen(lambda event: None)
            return
        try:
            generation.result()
        except MtnlgError:
            assert generation.finish_reason == "error"

    engine.start()
    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong
    engine.close(drain_seconds=60)
    check_nothing_is_lost(engine, found)

"""Small parts by themselves: names of tokens, wake-ups, the shape of an embedding."""

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.generation.request import TokenEvent, TokenLogprobs
from mtnlg.serving import logprobs
from mtnlg.serving.embeddings import pooled
from mtnlg.serving.vocabulary import Vocabulary
from mtnlg.serving.wakeups import Inbox, Wakeups


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer)


def test_bytes_of_tokens_make_the_text(vocabulary, tokenizer):
    text = "the cat 花落知多少 🙂\n\tnaïve <|user|>"
    ids = tokenizer.encode(text)
    assert b"".join(vocabulary.bytes_of(token) for token in ids).decode() == text


def test_every_token_has_a_name_of_its_own(vocabulary, tokenizer):
    names = [vocabulary.name_of(token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names)
    assert names[0] == "<|endoftext|>"
    assert any(name.startswith("bytes:\\x") for name in names)
    assert vocabulary.name_of(tokenizer.vocab_size + 5).startswith("<|id:")


@given(st.text(max_size=30))
def test_offsets_are_where_tokens_begin(tokenizer, vocabulary, text):
    ids = tokenizer.encode(text)
    offsets = vocabulary.offsets(ids)
    for place, (token, offset) in enumerate(zip(ids, offsets)):
        name = vocabulary.name_of(token)
        if not name.startswith("bytes:"):
            assert text[offset : offset + len(name)] == name, place
    assert offsets == sorted(offsets)


def test_names_that_collide_keep_the_likelier(vocabulary):
    entry = TokenLogprobs(-3.0, ((10**6, -1.0), (10**6, -2.0)))
    found = logprobs.legacy(vocabulary, [5], [entry], [0])
    assert max(found["top_logprobs"][0].values()) == -1.0
    assert logprobs.legacy(vocabulary, [5], [TokenLogprobs(float("-inf"))], [0])["token_logprobs"] == [
        -9999.0
    ]


def test_many_events_wake_the_loop_a_few_times_and_none_is_lost():
    async def listen():
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(1), original(*args))
        wakeups = Wakeups(loop)
        inboxes = [Inbox(wakeups) for _ in range(4)]

        def post():
            hear = [inbox.listener(0) for inbox in inboxes]
            for number in range(500):
                for one in hear:
                    one(TokenEvent(number))

        threads = [threading.Thread(target=post) for _ in range(2)]
        for thread in threads:
            thread.start()
        found = [[] for _ in inboxes]
        for inbox, mine in zip(inboxes, found):
            while len(mine) < 1000:
                mine += await inbox.take()
        for thread in threads:
            thread.join()
        return found, len(calls)

    found, num_calls = asyncio.run(asyncio.wait_for(listen(), 30))
    for mine in found:
        assert sorted(event.token for _, event in mine) == sorted([*range(500)] * 2)
    assert num_calls <= 4000


def test_a_poke_lets_go():
    async def wait():
        inbox = Inbox(Wakeups(asyncio.get_running_loop()))
        task = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.poke()
        return await task

    assert asyncio.run(asyncio.wait_for(wait(), 30)) == []


def test_events_after_the_loop_has_ended_harm_nobody():
    loop = asyncio.new_event_loop()
    hear = Inbox(Wakeups(loop)).listener(0)
    loop.close()
    assert hear(TokenEvent(1)) is None  # and raises nothing on the engine's thread


def test_an_embedding_has_length_one():
    states = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    whole, short = pooled(states), pooled(states, 3)
    assert np.linalg.norm(whole) == pytest.approx(1)
    assert short == pytest.approx(whole[:3] / np.linalg.norm(whole[:3]), abs=1e-6)
    assert not np.isnan(pooled(np.zeros((2, 4), np.float32))).any()


def test_a_server_starts_without_what_takes_long_to_import():
    program = """
import sys, torch
import mtnlg.api, mtnlg.serving.lifecycle
from mtnlg.interop.lazy_tensor import FileBytes, lazy, read
first, _ = lazy(FileBytes(sys.executable, 0), (4, 6), torch.uint8).t().split([2, 4])
slow = {"transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
sys.exit(" ".join(slow & set(sys.modules)) or 0)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert not found.stderr and found.returncode == 0

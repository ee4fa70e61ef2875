"""A server of an encoder-decoder: the prompt is read, the answer is what the decoder writes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.serving.conftest import Running, eventually

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.config.serving import ServerConfig
from mtnlg.encoder_decoder import MegatronEncoderDecoderModel
from mtnlg.generation.dialogue import Dialogue, DialogueOptions
from mtnlg.generation.dialogue_format import choose_format, dialogue_prompt
from mtnlg.serving.backend import Backend
from mtnlg.serving.lifecycle import Server
from mtnlg.tokens.t5_tokenizer import T5Tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    own = T5Tokenizer(tokenizer.definition, {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"})
    config = MegatronModelConfig(
        architecture="encoder_decoder", vocab_size=own.vocab_size, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, position_embedding="relative", normalization="rmsnorm", init_method_std=0.3,
        eos_token_id=own.end_of_text_id, pad_token_id=own.padding_id,
        decoder_start_token_id=own.padding_id, max_position_embeddings=512,
    )  # fmt: skip
    return MegatronEncoderDecoderModel(config, own, seed=5).eval()


@pytest.fixture(scope="module")
def running(model):
    engine = EngineConfig(max_batch_size=8, compile="off")
    form = choose_format(model.tokenizer)
    server = Server(
        ServerConfig(port=0), lambda: Backend.of_model(model, model.tokenizer, "tiny", form, engine)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.state.phase == "ready")
    yield Running(server, thread, None)
    server.stop()
    thread.join(20)


def test_completions_are_what_the_decoder_writes(running, model):
    client = running.openai()
    prompts = ["花落知多少", "the cat", "春眠不觉晓，处处闻啼鸟。" * 4, "dog"]

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers):
        assert answer.choices[0].text == model.generate(prompt, max_new_tokens=12)
        assert answer.usage.prompt_tokens == len(model.tokenizer.encode(prompt))
    pieces = client.completions.create(
        model="tiny", prompt=prompts[0], max_tokens=12, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == answers[0].choices[0].text


def test_embeddings_are_the_mean_of_what_the_encoder_gives(running, model):
    ids = model.tokenizer.encode("the cat sat")
    expected = model.make_engine().embed(ids).double().mean(0)
    found = running.openai().embeddings.create(model="tiny", input="the cat sat").data[0].embedding
    assert np.array(found) == pytest.approx((expected / expected.norm()).numpy(), abs=1e-4)


TALK = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "dog sat"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "夜来风雨声"},
]


def test_conversations_are_read_by_the_encoder_together_with_other_requests(running, model):
    client = running.openai()
    talks = [TALK[1:2], TALK[:2], TALK, TALK[1:]]
    options = {"model": "tiny", "max_tokens": 9, "temperature": 0}

    def ask(number):
        if number % 2:
            return client.completions.create(prompt="the dog" * number, **options).choices[0].text
        talk = talks[number // 2]
        pieces = client.chat.completions.create(messages=talk, stream=True, **options)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for number, answer in enumerate(answers):
        if number % 2:
            assert answer == model.generate("the dog" * number, max_new_tokens=9)
            continue
        ids = dialogue_prompt(model.tokenizer, talks[number // 2]).ids
        assert answer == model.generate(ids, max_new_tokens=9, details=True).text
        whole = client.chat.completions.create(messages=talks[number // 2], **options)
        assert whole.choices[0].message.content == answer
        assert whole.usage.prompt_tokens == len(ids)
    long = [{"role": "user", "content": "dog " * 300}]  # as much again may be written
    assert len(dialogue_prompt(model.tokenizer, long).ids) + 400 > 512
    given = {"model": "tiny", "messages": long, "max_tokens": 400}
    assert running.post("/v1/chat/completions", given).status_code == 200


def test_a_dialogue_reads_each_prompt_anew(model):
    dialogue = Dialogue(model.make_engine(), model.tokenizer, choose_format(model.tokenizer))
    dialogue.options = DialogueOptions(max_new_tokens=6)
    for text in ("dog sat", "the cat"):
        answer = dialogue.ask(text).result()
        expected = dialogue_prompt(model.tokenizer, dialogue.messages[:-1]).ids
        assert answer.prompt_ids == expected
        assert answer.text == model.generate(expected, max_new_tokens=6, details=True).text


def test_prompts_are_not_scored(running):
    for field in ({"echo": True, "logprobs": 1}, {"max_tokens": 0}):
        answer = running.post("/v1/completions", {"model": "tiny", "prompt": "dog", **field})
        assert answer.status_code == 400
        assert "reads a prompt and does not write it" in answer.json()["error"]["message"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"model": "tiny", "messages": TALK[1:2], "tools": tools}
    assert running.post("/v1/chat/completions", body).status_code == 400


def test_a_source_that_is_too_long_is_refused(running):
    answer = running.post("/v1/completions", {"model": "tiny", "prompt": [7] * 600, "max_tokens": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"

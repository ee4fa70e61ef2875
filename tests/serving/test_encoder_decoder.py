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
from mtnlg.generation.dialogue_format import choose_format
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


def test_a_source_that_is_too_long_is_refused(running):
    answer = running.post("/v1/completions", {"model": "tiny", "prompt": [7] * 600, "max_tokens": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"

"""Embeddings, tokens and models, with the plain model and the tokenizer as oracles."""

import numpy as np
import openai
import pytest
import torch

NAME = "tiny"


def test_an_embedding_is_the_mean_of_the_hidden_states(client, model, tokenizer):
    ids = tokenizer.encode("the cat sat")
    with torch.inference_mode():
        head, model.head = model.head, None
        hidden = head.norm(model(torch.tensor([ids])).hidden[0])
        model.head = head
    mean = hidden.double().mean(0)
    expected = (mean / mean.norm()).numpy()
    found = client.embeddings.create(model=NAME, input="the cat sat")  # the client asks for base64
    assert np.array(found.data[0].embedding) == pytest.approx(expected, abs=1e-4)
    assert found.usage.prompt_tokens == len(ids)


def test_forms_and_sizes_of_embeddings(client, tokenizer):
    texts = ["花落", "the mat"]
    many = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    assert [entry.index for entry in many.data] == [0, 1]
    by_ids = client.embeddings.create(model=NAME, input=[tokenizer.encode(text) for text in texts])
    short = client.embeddings.create(model=NAME, input=texts[1], dimensions=4).data[0].embedding
    for one, other in zip(many.data, by_ids.data):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    cut = np.array(many.data[1].embedding[:4])
    assert np.array(short) == pytest.approx(cut / np.linalg.norm(cut), abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=NAME, input="a", dimensions=17)


def test_more_texts_than_the_queue_holds(client):
    """As many as clients send by default; they go in groups, so that others may ask meanwhile."""
    texts = ["the cat", "a"] * 80
    found = client.embeddings.create(model=NAME, input=texts)
    one = client.embeddings.create(model=NAME, input="the cat")
    assert [entry.index for entry in found.data] == list(range(160))
    assert found.usage.total_tokens == 80 * (one.usage.total_tokens + 1)
    assert found.data[158].embedding == pytest.approx(one.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_text_goes_to_tokens_and_back(running, tokenizer, prefix):
    text = "the cat 花落 🙂"
    body = {"model": NAME, "prompt": text, "add_special_tokens": False, "return_token_strs": True}
    found = running.post(f"{prefix}/tokenize", body).json()
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = running.post(f"{prefix}/detokenize", {"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}


def test_special_names_are_tokens_unless_told(running):
    body = {"prompt": "<|endoftext|>", "add_special_tokens": False}
    assert running.post("/v1/tokenize", body).json()["tokens"] == [0]
    assert len(running.post("/v1/tokenize", {**body, "parse_special": False}).json()["tokens"]) > 1


def test_a_conversation_goes_to_tokens(running, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    found = running.post("/v1/tokenize", {"messages": messages}).json()["tokens"]
    assert found == tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_what_lm_eval_reads_of_the_tokenizer(running, tokenizer):
    info = running.get("/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>"
    assert info["pad_token"] == "<|padding|>"
    assert info["chat_template"] == tokenizer.chat_template
    eos = running.post("/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json()
    assert eos["tokens"] == [tokenizer.end_of_text_id]


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")

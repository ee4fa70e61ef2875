"""``/v1/completions`` as the openai client sees it, with the plain model as the oracle."""

import json

import openai
import pytest
import torch

from mtnlg.generation.text import continuation_text

NAME = "tiny"


def greedy(model, ids, count):
    """New ids of the plain model, token by token."""
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def true_logprobs(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def prompt_ids(tokenizer):
    return [0, *tokenizer.encode("the cat")]  # the start of a document comes first


def complete(client, prompt="the cat", **options):
    return client.completions.create(**{"model": NAME, "prompt": prompt, "temperature": 0, **options})


def test_greedy_tokens_are_the_models(client, model, tokenizer, prompt_ids):
    ids = greedy(model, prompt_ids, 6)
    answer = complete(client, max_tokens=6, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == continuation_text(tokenizer.decode, prompt_ids, ids)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", NAME)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == len(prompt_ids) + 6


def test_every_form_of_prompt_says_the_same(client, prompt_ids):
    text = complete(client).choices[0].text
    assert complete(client, prompt=prompt_ids).choices[0].text == text
    for prompts in (["the cat", "花落"], [prompt_ids, [5, 6]]):
        answer = complete(client, prompt=prompts)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].text == text


def test_sixteen_tokens_unless_told(client):
    assert complete(client, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_what_lm_eval_asks(client, model):
    """``logprobs[ctxlen:-1]`` are those of the continuation; the greatest tells if it was greedy."""
    rows = [[0, 7, 40, 41, 60, 61], [0, 9, 80]]
    answer = complete(client, prompt=rows, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for row, choice in zip(rows, answer.choices):
        truth = true_logprobs(model, row)
        found = choice.logprobs
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        assert len(found.token_logprobs) == len(row) + 1
        for place, token in enumerate(row[1:], start=1):
            assert found.token_logprobs[place] == pytest.approx(float(truth[place - 1, token]), abs=1e-3)
            best = max(found.top_logprobs[place].values())
            assert best == pytest.approx(float(truth[place - 1].max()), abs=1e-3)
            is_greedy = int(truth[place - 1].argmax()) == token
            assert (found.token_logprobs[place] == best) == is_greedy


def test_scoring_alone_generates_nothing(client):
    answer = complete(client, prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=0)
    assert len(answer.choices[0].logprobs.tokens) == 3
    assert answer.usage.completion_tokens == 0
    assert complete(client, prompt="a", max_tokens=0).choices[0].text == ""


def test_echo_gives_the_prompt_back_as_it_was(client):
    for prompt in ("the cat", "花落知多少", " <|user|> 🙂"):
        assert complete(client, prompt=prompt, echo=True, max_tokens=2).choices[0].text.startswith(prompt)


def test_offsets_point_into_the_text(client):
    choice = complete(client, prompt="花落知 the mat", echo=True, logprobs=2, max_tokens=5).choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset : offset + len(token)] == token


def test_a_seed_repeats_and_samples_differ(client):
    options = {"temperature": 1.5, "n": 3, "max_tokens": 8, "seed": 42}
    first, second = (complete(client, **options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == complete(client).usage.prompt_tokens  # counts once


def test_the_best_of_several_are_answered(client):
    options = {"temperature": 1.5, "max_tokens": 4, "seed": 3, "logprobs": 1}
    every = complete(client, n=5, **options)
    best = complete(client, n=2, best_of=5, **options)

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = sorted((mean(choice) for choice in every.choices), reverse=True)[:2]
    assert [mean(choice) for choice in best.choices] == pytest.approx(expected)
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_rules_reach_the_engine(client, tokenizer):
    word = tokenizer.encode(" sat")[0]
    forced = complete(client, logit_bias={str(word): 100}, max_tokens=3)
    assert forced.choices[0].text == tokenizer.decode([word] * 3)
    varied = complete(
        client, logit_bias={str(word): 100}, max_tokens=4, extra_body={"no_repeat_ngram_size": 1}
    )
    assert varied.choices[0].text.count(" sat") == 1


def test_a_stop_string_ends_and_is_not_said(client, tokenizer):
    word = tokenizer.encode(" sat")[0]
    options = {"logit_bias": {str(word): 100}, "max_tokens": 9}
    stopped = complete(client, stop=["t sat sa"], **options).choices[0]
    assert (stopped.text, stopped.finish_reason) == (" sa", "stop")
    kept = complete(client, stop="t s", extra_body={"include_stop_str_in_output": True}, **options)
    assert kept.choices[0].text == " sat s"


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_stop_string_ends_a_stream_before_any_of_it_is_said(client, tokenizer, num_prompts):
    word = tokenizer.encode(" sat")[0]
    options = {"logit_bias": {str(word): 100}, "max_tokens": 9, "stop": ["zz", "t sat sa"], "logprobs": 0}
    chunks = list(complete(client, prompt=["the cat"] * num_prompts, stream=True, **options))
    for index in range(num_prompts):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == " sa"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert mine[-1].finish_reason == "stop"


def test_end_tokens_end(client, tokenizer):
    end = tokenizer.end_of_text_id
    answer = complete(client, logit_bias={str(end): 100}, max_tokens=9).choices[0]
    assert (answer.text, answer.finish_reason) == ("", "stop")
    longer = complete(client, logit_bias={str(end): 100}, max_tokens=9, extra_body={"min_tokens": 3})
    assert longer.usage.completion_tokens == 4


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_the_whole_says(client, echo):
    options = {
        "prompt": ["春眠不觉晓", "the cat"],
        "n": 2,
        "temperature": 1,
        "seed": 9,
        "logprobs": 2,
        "max_tokens": 12,
        "echo": echo,
    }
    whole = complete(client, **options)
    texts, tokens, offsets, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)], [None] * 4
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        choice = chunk.choices[0]
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index] == choice.finish_reason
        assert len(offsets[choice.index]) == len(choice.logprobs.text_offset)


def test_the_bytes_of_a_stream(running):
    body = {"model": NAME, "prompt": "a", "max_tokens": 2, "temperature": 0, "stream": True}
    answer = running.post("/v1/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    for frame in frames[:-2]:
        chunk = json.loads(frame.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_no_character_is_ever_split(client, tokenizer):
    """Bytes of characters as tokens, drawn at random: no chunk has half of one."""
    stream = complete(client, prompt="花", temperature=1.8, max_tokens=60, seed=1, stream=True)
    for chunk in stream:
        chunk.choices[0].text.encode()  # no half of a surrogate pair
        assert "\ufffd" not in chunk.choices[0].text or chunk.choices[0].finish_reason is None


def test_guided_rules(client):
    for rule, check in (
        ({"guided_regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= set("ab")),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_json": {"enum": [1, 2]}}, lambda text: json.loads(text) in (1, 2)),
        ({"guided_grammar": 'start: "x" "y"'}, lambda text: text == "xy"),
    ):
        answer = complete(client, max_tokens=20, extra_body=rule).choices[0]
        assert check(answer.text), (rule, answer.text)
        assert answer.finish_reason == "stop"


def test_suffix_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, suffix="end")
    assert caught.value.param == "suffix"

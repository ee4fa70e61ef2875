from __future__ import annotations

import warnings

import pytest
import torch

from mtnlg.config import ConfigError
from mtnlg.generation import SamplingRules, generate
from mtnlg.generation.runner import PlainRunner

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
FAMILIES = ["gpt", "llama", "no-positions"]


def ids_of(continuations) -> list[list[int]]:
    return [continuation.ids for continuation in continuations]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_repeated_argmax(make_model, family):
    model = make_model(family)
    for prompt, found in zip(PROMPTS, ids_of(generate(model, PROMPTS, max_new_tokens=12))):
        expected = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [SamplingRules(), SamplingRules(0.8, 20, 0.9, seed=1)])
def test_cache_and_batch_change_nothing(make_model, family, rules):
    model = make_model(family)
    cached = ids_of(generate(model, PROMPTS, rules, max_length=20, use_cache=True))
    assert cached == ids_of(generate(model, PROMPTS, rules, max_length=20, use_cache=False))
    assert cached[0] == ids_of(generate(model, PROMPTS[:1], rules, max_length=20))[0]


def test_use_cache_of_the_config_is_obeyed(make_model, monkeypatch):
    longest = []

    class Spy(PlainRunner):
        def run(self, rows):
            longest.append(max(len(row.ids) for row in rows))
            return super().run(rows)

    monkeypatch.setattr("mtnlg.generation.engine.make_runner", lambda model, config: Spy(model, 30))
    generate(make_model(use_cache=False), PROMPTS, max_new_tokens=2)
    assert longest == [8, 9]
    longest.clear()
    generate(make_model(use_cache=True), PROMPTS, max_new_tokens=2)
    assert longest == [8, 1]


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(make_model):
    model = make_model()
    assert [len(ids) for ids in ids_of(generate(model, PROMPTS, max_length=10))] == [10, 10, 10]
    assert [len(ids) for ids in ids_of(generate(model, PROMPTS, max_new_tokens=4))] == [7, 5, 12]
    both = generate(model, PROMPTS, max_length=10, max_new_tokens=4)
    assert [len(ids) for ids in ids_of(both)] == [7, 5, 10]
    assert {continuation.finish_reason for continuation in both} == {"length"}


def test_an_end_token_ends_its_own_row_only(make_model):
    model = make_model()
    free = ids_of(generate(model, PROMPTS, max_new_tokens=10))
    end = free[1][4]  # row 1's fourth new token
    stopped = generate(model, PROMPTS, max_new_tokens=10, end_ids=[end])
    for before, after in zip(free, stopped):
        new = before[after.usage.prompt_tokens :]
        if end in new:
            assert after.new_ids == new[: new.index(end) + 1]
            assert after.finish_reason == "end"
        else:
            assert after.ids == before
    assert stopped[1].finish_reason == "end"


def test_tokens_are_announced_as_they_come(make_model):
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
    result = generate(
        make_model(), PROMPTS, max_length=12, on_token=lambda row, token: heard[row].append(token)
    )
    assert [heard[row] for row in range(3)] == [continuation.new_ids for continuation in result]


def test_it_stops_at_the_last_position_with_a_warning(make_model):
    model = make_model()
    with pytest.warns(UserWarning, match="stops at 48"):
        result = generate(model, PROMPTS, max_length=100)
    assert [len(continuation.ids) for continuation in result] == [48, 48, 48]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, PROMPTS, max_length=48)


def test_the_model_is_left_as_it_was(make_model):
    model = make_model(hidden_dropout=0.5).train()
    first = ids_of(generate(model, PROMPTS, max_length=20))
    assert model.training
    assert first == ids_of(generate(model.eval(), PROMPTS, max_length=20))
    assert not model.training


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([67], {}, "0 to 66"),
        ([-1], {}, "0 to 66"),
        ([1] * 48, {}, "48 positions"),
        ([1] * 5, {"max_length": 5}, "counts prompt and continuation"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"max_length": -3}, "max_length is -3"),
    ],
)
def test_bad_requests_are_refused(make_model, prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(make_model(), [[1, 2], prompt], **options)


def test_a_model_without_weights_is_refused(make_model):
    with torch.device("meta"):
        model = type(make_model())(make_model().config)
    with pytest.raises(ConfigError, match="meta"):
        generate(model, PROMPTS)


def test_no_prompts_give_no_continuations(make_model):
    assert generate(make_model(), []) == []


def test_the_wrong_prompt_is_named(make_model):
    with pytest.raises(ConfigError, match=r"prompt 1: the prompt is empty"):
        generate(make_model(), [[1], []])


def test_more_prompts_than_run_at_once(make_model):
    model = make_model()
    prompts = [[number % 67, 3] for number in range(40)]
    found = ids_of(generate(model, prompts, max_new_tokens=3))
    assert found[33] == ids_of(generate(model, prompts[33:34], max_new_tokens=3))[0]


def test_whoever_listens_may_stop_it(make_model):
    def listen(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(make_model(), PROMPTS, max_new_tokens=4, on_token=listen)

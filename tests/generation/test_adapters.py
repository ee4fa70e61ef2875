"""Adapters per request, mixed in one batch: the same tokens as each adapter alone in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.generation.adapters import KINDS, make_adapter

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.errors import CheckpointError, ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.answers import search_one
from mtnlg.generation.engine import Engine
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.request import GenerationRequest
from mtnlg.generation.runner import PlainRunner
from mtnlg.generation.search import SearchOptions
from mtnlg.interop.adapter import Adapter, LowRank, load_adapter, values_of
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import merge_low_rank
from mtnlg.model.virtual_tokens import prompt_with_virtual

MakeModel = Callable[..., MegatronLmDecoder]


def make_prompts(lengths: list[int]) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(67, (length,), generator=random).tolist() for length in lengths]


def alone(model: MegatronLmDecoder, adapter: Adapter | None, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the model with the adapter merged or put in, without engine, pages or cache."""
    model = copy.deepcopy(model)
    ids = list(prompt)
    if adapter is not None:
        load_adapter(model, adapter)
        ids = prompt_with_virtual(ids, adapter.config, model.config.vocab_size)
        if adapter.config.method == "lora":
            merge_low_rank(model)
    new = []
    with torch.no_grad():
        for _ in range(count):
            # the class's own: an instance with virtual tokens would put them in a second time
            output = MegatronLmDecoder.forward(model, torch.tensor([ids + new]))
            new.append(int(output.logits[0, -1].argmax()))
    return new


def run_mixed(engine: Engine, named: list[tuple[str | None, list[int]]], count: int) -> list[list[int]]:
    asked = [
        engine.submit(GenerationRequest(prompt, max_new_tokens=count, adapter=name))
        for name, prompt in named
    ]
    return [generation.result().new_ids for generation in asked]


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_mixed_batch_says_what_each_adapter_says_alone(
    make_model: MakeModel, family: str, deterministic: bool, compile: str
) -> None:
    model = make_model(family)
    kinds: list[str | None] = [None, *KINDS, None, "low-rank"]
    adapters = {kind: make_adapter(model, kind) for kind in KINDS}
    engine = Engine(model, config=EngineConfig(deterministic=deterministic, compile=compile))
    assert isinstance(engine.runner, FastRunner)
    for name, adapter in adapters.items():
        engine.adapters.add(name, adapter)
    prompts = make_prompts([3, 20, 7, 1, 18, 9, 4, 12, 20])
    found = run_mixed(engine, list(zip(kinds, prompts)), 9)
    for kind, prompt, new in zip(kinds, prompts, found):
        adapter = None if kind is None else adapters[kind]
        assert new == alone(model, adapter, prompt, 9), kind
    # What it says is another thing with each: else nothing was tested.
    texts = {tuple(run_mixed(engine, [(kind, prompts[1])], 9)[0]) for kind in [None, *KINDS]}
    assert len(texts) > len(KINDS) - 1


def test_the_plain_runner_gives_the_same(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.layers["1"].register_forward_hook(lambda *args: None)  # so that nothing is prepared
    trained = [parameter.requires_grad for parameter in model.parameters()]
    engine = Engine(model, config=EngineConfig(compile="off"))
    assert isinstance(engine.runner, PlainRunner)
    kinds = ["all", "prompt-behind", "prefix", None]
    for kind in kinds[:3]:
        engine.adapters.add(kind, make_adapter(model, kind))
    prompts = make_prompts([5, 20, 2, 9])
    for kind, prompt, new in zip(kinds, prompts, run_mixed(engine, list(zip(kinds, prompts)), 5)):
        assert new == alone(model, kind and make_adapter(model, kind), prompt, 5), kind
    assert model.adapter is None
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_the_adapter_that_is_in_a_model_is_mixed_in_like_any(make_model: MakeModel) -> None:
    base = make_model("llama")
    [prompt] = make_prompts([12])
    for kind in KINDS:
        model, adapter = copy.deepcopy(base), make_adapter(base, kind)
        load_adapter(model, adapter)
        before = [(name, id(item)) for name, item in model.named_parameters()]
        logits = model(torch.tensor([prompt])).logits
        engine = Engine(model, config=EngineConfig(compile="off"))
        assert isinstance(engine.runner, FastRunner)
        assert run_mixed(engine, [(None, prompt)], 6) == [alone(base, adapter, prompt, 6)], kind
        assert [(name, id(item)) for name, item in model.named_parameters()] == before
        assert torch.equal(model(torch.tensor([prompt])).logits, logits)
        changed = make_adapter(base, kind, seed=1)
        values = values_of(changed)
        with torch.no_grad():
            for name, item in model.named_parameters():
                if name in values:
                    item.copy_(values[name])
        engine.forget()
        assert run_mixed(engine, [(None, prompt)], 6) == [alone(base, changed, prompt, 6)], kind


@pytest.mark.parametrize("compile", ["off", "on"])
def test_answers_do_not_depend_on_who_else_is_there(make_model: MakeModel, compile: str) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(deterministic=True, compile=compile))
    names = ["low-rank", "dora", "prefix"]
    for name in names:
        engine.adapters.add(name, make_adapter(model, name))
    prompts = make_prompts([20, 7, 18, 9])
    named = [*zip([*names, None], prompts)]

    def logprobs(among: list[tuple[str | None, list[int]]]) -> list[list[float]]:
        asked = [
            engine.submit(GenerationRequest(prompt, max_new_tokens=6, adapter=name, logprobs=0))
            for name, prompt in among
        ]
        return [[one.logprob for one in generation.result().logprobs] for generation in asked]

    together = logprobs(named)
    for one, expected in zip(named, together):
        assert logprobs([one]) == [expected]  # bit for bit


def test_beginnings_of_texts_are_kept_apart(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(compile="off"))
    names = ["low-rank", "all", "prompt"]
    for name in names:
        engine.adapters.add(name, make_adapter(model, name))
    [prompt] = make_prompts([33])
    for cached in (0, 32):
        for name in [None, *names]:
            generation = engine.submit(GenerationRequest(prompt, max_new_tokens=4, adapter=name)).result()
            assert generation.usage.cached_tokens == cached
            assert generation.new_ids == alone(model, name and make_adapter(model, name), prompt, 4)


def test_one_that_is_taken_away_serves_those_who_began_with_it(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(compile="off"))
    first, second = (make_adapter(model, "all", seed) for seed in (1, 2))
    engine.adapters.add("poet", first)
    [prompt] = make_prompts([20])
    running = engine.submit(GenerationRequest(prompt, max_new_tokens=8, adapter="poet"))
    engine.step()
    engine.adapters.remove("poet")
    assert engine.adapters.names == []
    with pytest.raises(ConfigError, match="there is no adapter 'poet': none is loaded"):
        engine.submit(GenerationRequest(prompt, adapter="poet"))
    engine.adapters.add("poet", second)  # another of the same name
    after = engine.submit(GenerationRequest(prompt, max_new_tokens=8, adapter="poet"))
    assert running.result().new_ids == alone(model, first, prompt, 8)
    assert after.result().new_ids == alone(model, second, prompt, 8)


def test_changed_weights_and_searches_follow_the_adapter(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(compile="off"))
    adapter = make_adapter(model, "all")
    engine.adapters.add("poet", adapter)
    [prompt] = make_prompts([6])
    merged = copy.deepcopy(model)
    load_adapter(merged, adapter)
    merge_low_rank(merged)
    request, options = GenerationRequest(prompt, max_new_tokens=5), SearchOptions(num_beams=3)
    expected = search_one(Engine(merged), request, options)[0].new_ids
    named = GenerationRequest(prompt, max_new_tokens=5, adapter="poet")
    assert search_one(engine, named, options)[0].new_ids == expected
    assert engine.submit(named).result().new_ids == alone(model, adapter, prompt, 5)
    with torch.no_grad():
        model.layers["0"].mlp.up.weight.mul_(-1)
    engine.forget()
    assert engine.submit(named).result().new_ids == alone(model, adapter, prompt, 5)
    engine.adapters.add("soft", make_adapter(model, "prompt"))
    with pytest.raises(ConfigError, match="virtual tokens"):
        search_one(engine, GenerationRequest(prompt, adapter="soft"), options)


def test_guesses_are_checked_with_the_adapter(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(speculation="ngram", compile="off"))
    for kind in ("low-rank", "prompt"):
        engine.adapters.add(kind, make_adapter(model, kind))
    prompt = make_prompts([6])[0] * 3
    for kind in ("low-rank", "prompt"):
        [new] = run_mixed(engine, [(kind, prompt)], 20)
        assert new == alone(model, make_adapter(model, kind), prompt, 20)
    assert engine.statistics.drafted_tokens


def test_what_does_not_fit_is_refused(make_model: MakeModel) -> None:
    model, other = make_model(), make_model(hidden_size=48, num_hidden_layers=4)
    shelf = Engine(model, config=EngineConfig(compile="off")).adapters
    for kind, words in (
        ("all", r"its update of layers.0.attention.query is 48 to 48, the layer 32 to 32"),
        ("prompt", r"virtual tokens have the shape \[5, 48\], the model wants \[5, 32\]"),
        ("prefix", r"its prefix has the shape \[4, 2, 4, 7, 12\], the model wants \[3, 2, 4, 7, 8\]"),
    ):
        with pytest.raises(CheckpointError, match=words):
            shelf.add("poet", make_adapter(other, kind))
    gated = make_model("llama", activation_function="swiglu")
    config = AdapterConfig(target_modules=["mlp.gate"])
    gate = LowRank(torch.zeros(8, 32), torch.zeros(gated.config.ffn_size, 8), config.scale)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate, which is no linear layer"):
        shelf.add("poet", Adapter(config, low_rank={"layers.0.mlp.gate": gate}))
    shelf.add("poet", make_adapter(model, "all"))
    with pytest.raises(ConfigError, match="there is an adapter 'poet' already"):
        shelf.add("poet", make_adapter(model, "all"))
    with pytest.raises(ConfigError, match="there is no adapter 'cook': there are poet"):
        shelf.remove("cook")


def test_a_prompt_leaves_room_for_virtual_tokens(make_model: MakeModel) -> None:
    model = make_model()
    engine = Engine(model, config=EngineConfig(compile="off"))
    engine.adapters.add("soft", make_adapter(model, "prompt"))
    [prompt] = make_prompts([40])
    generation = engine.submit(GenerationRequest(prompt, max_new_tokens=50, adapter="soft")).result()
    assert len(generation.new_ids) == 48 - 5 - 40
    assert generation.usage.prompt_tokens == 40
    with pytest.raises(ConfigError, match="the model 43 positions"):
        engine.submit(GenerationRequest(prompt + prompt[:4], adapter="soft"))


def test_rows_without_an_adapter_have_the_very_same_numbers(make_model: MakeModel) -> None:
    model = make_model(hidden_size=64)
    config = EngineConfig(compile="off")
    with_others, without = Engine(model, config=config), Engine(model, config=config)
    with_others.adapters.add("poet", make_adapter(model, "all"))
    prompts = make_prompts([20, 7])

    def logprobs(engine: Engine, name: str | None) -> list[float]:
        other = engine.submit(GenerationRequest(prompts[1], max_new_tokens=6, adapter=name))
        asked = GenerationRequest(prompts[0], max_new_tokens=6, logprobs=0)
        found = [one.logprob for one in engine.submit(asked).result().logprobs]
        other.result()
        return found

    assert logprobs(with_others, "poet") == logprobs(without, None)

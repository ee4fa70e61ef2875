import itertools
import random

import pytest
import torch
from tests.generation.constraints.models import SPARE_IDS, make_tokenizer

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, GenerationRequest, SamplingRules
from mtnlg.generation.constraints import constraint_from_options
from mtnlg.generation.runner import PlainRunner
from mtnlg.generation.sampler import SamplingState
from mtnlg.generation.sampling import stream_of
from mtnlg.generation.speculation import ModelDrafter, sample_drafted
from mtnlg.generation.speculation.ngram import NgramIndex
from mtnlg.model import MegatronLmDecoder, initialize_weights


def make_draft(model, seed=4, layers=1, **fields):
    """A smaller model that knows some of what the large one knows: its embeddings."""
    shape = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=layers, init_method_std=0.3)
    shape |= dict(
        vocab_size=model.config.vocab_size, max_position_embeddings=model.config.max_position_embeddings
    )
    config = MegatronModelConfig(**(shape | fields))
    draft = MegatronLmDecoder(config)
    initialize_weights(draft, config, seed=seed)
    own, known = draft.state_dict(), model.state_dict()
    draft.load_state_dict(
        {
            name: known[name] if "layers" not in name and known[name].shape == t.shape else t
            for name, t in own.items()
        }
    )
    return draft.eval()


def ask(engine, requests):
    with torch.no_grad():
        generations = [engine.submit(request) for request in requests]
        return [generation.result() for generation in generations]


def mixture(seeds=True):
    """Requests of every kind, for one batch."""
    chance = random.Random(5)
    repeating = [1, 2, 3, 4, 5] * 4
    prompts = [repeating, [9], [chance.randrange(67) for _ in range(11)], repeating[2:], [7, 7, 7]]
    rules = [
        SamplingRules(),
        SamplingRules(repetition_penalty=1.3),
        SamplingRules(no_repeat_ngram_size=2),
        SamplingRules(frequency_penalty=0.5, logit_bias=((3, 2.0),)),
        SamplingRules(),
    ]
    if seeds:
        rules[1] = SamplingRules(temperature=1.0, top_p=0.9, seed=1)
        rules[3] = SamplingRules(temperature=0.7, top_k=9, presence_penalty=0.2, seed=2)
    return [
        GenerationRequest(prompt, rule, max_new_tokens=20, end_ids=[60], min_new_tokens=3, logprobs=2)
        for prompt, rule in zip(prompts, rules)
    ]


# -- the same tokens


@pytest.mark.parametrize("num_pages", [60, 7])
def test_ngrams_change_no_token(make_model, num_pages):
    model = make_model()
    expected = ask(Engine(model, runner=PlainRunner(model, num_pages)), mixture())
    engine = Engine(
        model,
        config=EngineConfig(speculation="ngram", min_ngram=1, max_ngram=3),
        runner=PlainRunner(model, num_pages),
    )
    found = ask(engine, mixture())
    for one, same in zip(found, expected):
        assert one.new_ids == same.new_ids and one.finish_reason == same.finish_reason
        assert [s.logprob for s in one.logprobs] == pytest.approx(
            [s.logprob for s in same.logprobs], abs=1e-4
        )
    assert engine.statistics.drafted_tokens > engine.statistics.accepted_tokens > 0
    assert engine.statistics.cache_tokens == 0


@pytest.mark.parametrize("num_pages", [60, 7])
def test_a_draft_model_changes_no_greedy_token(make_model, num_pages):
    model = make_model()
    expected = ask(Engine(model, runner=PlainRunner(model, num_pages)), mixture(seeds=False))
    drafter = ModelDrafter(PlainRunner(make_draft(model), 60), num_tokens=3, prefill_chunk=8)
    engine = Engine(model, runner=PlainRunner(model, num_pages), drafter=drafter)
    found = ask(engine, mixture(seeds=False))
    for one, same in zip(found, expected):
        assert one.new_ids == same.new_ids and one.finish_reason == same.finish_reason
    assert engine.statistics.drafted_tokens > 0
    assert drafter._books.num_free == 60 and not drafter._pasts


def test_a_draft_model_that_is_the_model_is_always_right(make_model):
    model = make_model()
    for rules in (SamplingRules(), SamplingRules(temperature=1.0, seed=3)):
        config = EngineConfig(speculation="draft", num_speculative_tokens=3)
        engine = Engine(model, config=config, draft_model=model)
        (found,) = ask(engine, [GenerationRequest([1, 2, 3], rules, max_new_tokens=21)])
        assert len(found.new_ids) == 21
        assert engine.statistics.accepted_tokens == engine.statistics.drafted_tokens == 15
        assert engine.statistics.steps == 6  # the prompt, then four tokens at a time


def test_with_deterministic_the_batch_does_not_matter(make_model):
    model = make_model()
    draft = make_draft(model)

    def fresh():
        return Engine(
            model, config=EngineConfig(speculation="draft", deterministic=True), draft_model=draft
        )

    together = ask(fresh(), mixture())
    for request, same in zip(mixture(), together):
        (alone,) = ask(fresh(), [request])
        assert alone.new_ids == same.new_ids


def test_with_rules_that_guide():
    tokenizer = make_tokenizer()
    vocab = tokenizer.vocab_size + SPARE_IDS
    config = MegatronModelConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_method_std=0.3,
    )
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=3)
    model.eval()
    rules = [
        ("verse", "wujue"),
        ("regex", "(春天){2,5}[a-z]{8}"),
        ("choice", ["yes", "no"]),
        ("json_schema", {"type": "array", "items": {"enum": ["秋", "秋天"]}, "minItems": 3, "maxItems": 3}),
    ]
    requests = [
        GenerationRequest(
            [7, 8, 9],
            max_new_tokens=120,
            constraint=constraint_from_options(tokenizer, vocab, *rule),
        )
        for rule in rules
    ]
    expected = ask(Engine(model, tokenizer.decode), requests)
    assert all(one.finish_reason == "stop" for one in expected)
    for speculation in ("ngram", "draft"):
        engine = Engine(
            model,
            tokenizer.decode,
            EngineConfig(speculation=speculation, min_ngram=1),
            draft_model=make_draft(model) if speculation == "draft" else None,
        )
        found = ask(engine, requests)
        assert [one.text for one in found] == [one.text for one in expected]
        assert engine.statistics.accepted_tokens > 0


# -- the same distribution


def chi_square(observed, expected):
    """Pearson's statistic as standard deviations from its mean (Wilson and Hilferty)."""
    observed, expected = torch.tensor(observed).double(), torch.tensor(expected).double()
    freedom = len(observed) - 1
    ratio = float(((observed - expected) ** 2 / expected).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def draw_with_guesses(logits, draft_logits, rules, count):
    """Tokens chosen after a guess from the draft's distribution under the same rules."""
    generator = torch.Generator().manual_seed(0)
    draft = torch.softmax(draft_logits / rules.temperature, -1)
    guesses = torch.multinomial(draft, count, replacement=True, generator=generator).tolist()
    states = [SamplingState(rules, [0], stream_of(rules.seed, row)) for row in range(count)]
    found = []
    for start in range(0, count, 500):
        part = slice(start, start + 500)
        chosen = sample_drafted(
            logits.repeat(500, 1), states[part], [(token, draft) for token in guesses[part]]
        )
        found += [sampled.token for sampled in chosen]
    return found, guesses


@pytest.mark.parametrize("nearness", [0.0, 1.0])
def test_what_is_kept_or_replaced_is_drawn_from_the_model(nearness):
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(11, generator=generator)
    draft_logits = nearness * logits + (1 - 0.7 * nearness) * torch.randn(11, generator=generator)
    rules = SamplingRules(temperature=0.8, top_k=8, seed=6)
    found, guesses = draw_with_guesses(logits, draft_logits, rules, 20_000)
    wanted = torch.softmax(logits / 0.8, -1)
    wanted[logits.argsort()[:3]] = 0
    wanted /= wanted.sum()
    counts = torch.bincount(torch.tensor(found), minlength=11).double()
    kept = wanted > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept].tolist(), (wanted[kept] * len(found)).tolist()) < 3.5
    # A guess is kept as often as it can be: Σ min(p, q).
    share = sum(token == guess for token, guess in zip(found, guesses)) / len(found)
    overlap = torch.minimum(wanted, torch.softmax(draft_logits / 0.8, -1)).sum()
    assert share == pytest.approx(float(overlap), abs=0.015)


def test_whole_answers_are_drawn_from_the_model(make_model):
    """Three tokens of five: all 125 answers as often as the model alone says."""
    model = make_model(vocab_size=5, hidden_size=16, num_hidden_layers=1, init_method_std=0.5)
    draft = make_draft(model, seed=8, hidden_size=16, init_method_std=0.5)
    expected = {}
    with torch.no_grad():
        for answer in itertools.product(range(5), repeat=3):
            logits = model(torch.tensor([[1, 2, *answer]])).logits[0]
            weights = torch.softmax(logits.double()[1:4] / 1.2, -1)
            expected[answer] = float(weights[0, answer[0]] * weights[1, answer[1]] * weights[2, answer[2]])
    count = 4000
    config = EngineConfig(
        speculation="draft", num_speculative_tokens=2, max_batch_size=64, max_queue_size=count
    )
    engine = Engine(model, config=config, draft_model=draft)
    requests = [
        GenerationRequest([1, 2], SamplingRules(temperature=1.2, seed=seed), max_new_tokens=3)
        for seed in range(count)
    ]
    answers = [tuple(found.new_ids) for found in ask(engine, requests)]
    assert 0 < engine.statistics.accepted_tokens < engine.statistics.drafted_tokens
    common = [answer for answer, weight in expected.items() if weight * count >= 5]
    observed = [answers.count(answer) for answer in common]
    rare = count - sum(observed)
    weights = [expected[answer] * count for answer in common]
    assert len(common) > 20 and chi_square([*observed, rare], [*weights, count - sum(weights)]) < 3.5


# -- guesses


def test_ngrams_are_found_where_they_last_stood():
    chance = random.Random(2)
    ids = [chance.randrange(4) for _ in range(60)]
    index = NgramIndex(2, 4)
    for end in range(1, len(ids)):
        index.extend(ids[:end])
        expected = []
        for size in (4, 3, 2):
            places = [i for i in range(size, end) if ids[i - size : i] == ids[end - size : end]]
            if places:
                expected = ids[places[-1] : end][:5]
                break
        assert index.guess(5)[: len(expected)] == expected
        assert bool(index.guess(5)) == bool(expected) and len(index.guess(5)) in (0, 5)


def test_a_period_goes_on():
    index = NgramIndex(2, 3)
    index.extend([8, 9, 1, 2, 3, 1, 2])
    assert index.guess(7) == [3, 1, 2, 3, 1, 2, 3]


def test_guesses_end_with_the_request_and_with_the_draft_model(make_model):
    model = make_model()
    short = make_draft(model, max_position_embeddings=12)
    drafter = ModelDrafter(PlainRunner(short, 20), num_tokens=4)
    engine = Engine(model, runner=PlainRunner(model, 20), drafter=drafter)
    first, second = ask(
        engine,
        [GenerationRequest([1, 2, 3], max_new_tokens=30), GenerationRequest([1], max_new_tokens=2)],
    )
    assert len(first.new_ids) == 30 and len(second.new_ids) == 2
    assert first.new_ids == ask(Engine(model), [GenerationRequest([1, 2, 3], max_new_tokens=30)])[0].new_ids


def test_a_request_given_up_frees_the_draft_models_memory(make_model):
    model = make_model()
    drafter = ModelDrafter(PlainRunner(make_draft(model), 20))
    engine = Engine(model, runner=PlainRunner(model, 20), drafter=drafter)
    generation = engine.submit(GenerationRequest([1, 2, 3], max_new_tokens=30))
    for _ in range(3):
        engine.step()
    assert drafter._books.num_free < 20
    generation.cancel()
    engine.step()
    assert drafter._books.num_free == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(speculation="magic"), "choose one of none, ngram, draft"),
        (dict(num_speculative_tokens=0), "num_speculative_tokens is 0"),
        (dict(min_ngram=5), "max_ngram is 4: it must be at least 5"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)


def test_draft_models_that_do_not_fit(make_model):
    model, other = make_model(), make_model(vocab_size=68)
    with pytest.raises(ConfigError, match="there is no draft model"):
        Engine(model, config=EngineConfig(speculation="draft"))
    with pytest.raises(ConfigError, match="only one can guess"):
        Engine(model, config=EngineConfig(speculation="ngram"), draft_model=model)
    with pytest.raises(ConfigError, match="68 tokens and the model 67"):
        Engine(model, config=EngineConfig(speculation="draft"), draft_model=other)

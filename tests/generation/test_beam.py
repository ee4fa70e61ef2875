"""Beam search beside transformers on the same weights; diverse beam search beside its definition."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from mtnlg.config import ConfigError, MtnlgError
from mtnlg.generation import GenerationRequest, SamplingRules
from mtnlg.generation.beam import beam_search
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.runner import PlainRunner
from mtnlg.generation.search import SearchOptions
from mtnlg.interop import write_hugging_face

PADDING = 66  # transformers takes 0 for "none given"
PROMPTS = [[5, 9, 2], [7], list(range(1, 19))]


class Access:
    """A runner of its own, and proof that every page came back."""

    def __init__(self, model, num_pages=200, page_size=4):
        self.runner = PlainRunner(model, num_pages, page_size)
        self.books = PageBooks(num_pages, page_size)
        self.is_open = False

    @contextlib.contextmanager
    def __call__(self):
        assert not self.is_open
        self.is_open = True
        try:
            yield self.runner, self.books
        finally:
            self.is_open = False

    @property
    def is_clean(self):
        return self.books.num_free == self.books.num_pages


def search(model, prompt, max_new=8, end_ids=(), rules=None, min_new=0, **options):
    access = Access(model)
    request = GenerationRequest(prompt, rules or SamplingRules(), end_ids=end_ids, min_new_tokens=min_new)
    try:
        return beam_search(access, request, SearchOptions(**options), len(prompt) + max_new)
    finally:
        assert access.is_clean


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A family's model of ours and the same one in transformers."""
    transformers = pytest.importorskip("transformers")

    @cache
    def make(family):
        from tests.generation.conftest import FAMILIES

        from mtnlg.config import MegatronModelConfig
        from mtnlg.model import MegatronLmDecoder, initialize_weights

        shape = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=48, init_method_std=0.3)  # fmt: skip
        config = MegatronModelConfig(**{**shape, **FAMILIES[family]})
        ours = MegatronLmDecoder(config)
        initialize_weights(ours, config, seed=3)
        folder: Path = tmp_path_factory.mktemp(family)
        write_hugging_face(ours.eval(), folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = PADDING
        return ours, theirs

    return make


def transformers_search(model, prompt, max_new, end_ids, **options):
    kwargs = {"eos_token_id": list(end_ids)} if end_ids else {}
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new, do_sample=False, output_scores=True, return_dict_in_generate=True,
            pad_token_id=PADDING, **kwargs, **options,
        )  # fmt: skip
    return [row[len(prompt) :].tolist() for row in out.sequences], out.sequences_scores.tolist()


BEAMS = {
    "plain": dict(num_beams=4, num_return_sequences=4),
    "two": dict(num_beams=2, length_penalty=0.0),
    "short": dict(num_beams=3, num_return_sequences=3, length_penalty=-1.0),
    "long": dict(num_beams=4, num_return_sequences=2, length_penalty=2.0, early_stopping="never"),
    "early": dict(num_beams=5, num_return_sequences=5, early_stopping=True),
    "never": dict(num_beams=3, num_return_sequences=3, early_stopping="never"),
}


@pytest.mark.parametrize(("family", "name"), [*(("gpt", name) for name in BEAMS), ("llama", "plain")])
def test_beams_and_scores_are_those_of_transformers(twins, family, name):
    ours, theirs = twins(family)
    for prompt in PROMPTS[1:]:
        for end_ids in ((), (3, 11), tuple(range(8, 64))):
            expected, scores = transformers_search(theirs, prompt, 7, end_ids, **BEAMS[name])
            found = search(ours, prompt, 7, end_ids, **BEAMS[name])
            for one, ids, score in zip(found, expected, scores, strict=True):
                padding = [PADDING] * (len(ids) - len(one.new_ids))
                assert [*one.new_ids, *padding] == ids
                assert one.score == pytest.approx(score, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize(
    "rules",
    [
        dict(repetition_penalty=1.4),
        dict(no_repeat_ngram_size=2),
        dict(repetition_penalty=1.2, no_repeat_ngram_size=3, min_new_tokens=5),
    ],
)
def test_rules_in_beams_are_those_of_transformers(twins, rules):
    ours, theirs = twins("gpt")
    for prompt in PROMPTS[1:]:
        ends = tuple(range(10, 30))
        expected, scores = transformers_search(
            theirs, prompt, 10, ends, num_beams=3, num_return_sequences=3, **rules
        )
        own = {name: value for name, value in rules.items() if name != "min_new_tokens"}
        least = rules.get("min_new_tokens", 0)
        found = search(
            ours, prompt, 10, ends, SamplingRules(**own), least, num_beams=3, num_return_sequences=3
        )
        for one, ids, score in zip(found, expected, scores, strict=True):
            assert [*one.new_ids, *[PADDING] * (len(ids) - len(one.new_ids))] == ids
            assert one.score == pytest.approx(score, rel=1e-5, abs=2e-5)


def logprobs_after(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def diverse_by_definition(model, prompt, steps, num_groups, size, penalty):
    """Algorithm 1 of arXiv 1610.02424 with Hamming diversity, without end tokens or a cache."""
    groups = [[(list(prompt), 0.0)] for _ in range(num_groups)]
    for _ in range(steps):
        chosen: Counter[int] = Counter()
        for number, beams in enumerate(groups):
            options = []
            for ids, score in beams:
                for token, logprob in enumerate(logprobs_after(model, ids).tolist()):
                    total = score + logprob
                    options.append((total - penalty * chosen[token], total, [*ids, token]))
            options.sort(key=lambda option: -option[0])
            groups[number] = [(ids, total) for _, total, ids in options[:size]]
            chosen.update(ids[-1] for ids, _ in groups[number])
    everyone = [(ids[len(prompt) :], score / steps) for beams in groups for ids, score in beams]
    return sorted(everyone, key=lambda one: -one[1])


@pytest.mark.parametrize(
    ("groups", "size", "penalty"), [(2, 2, 0.7), (3, 1, 2.5), (2, 3, 0.0), (4, 1, 50.0)]
)
def test_diverse_beam_search_is_the_papers(make_model, groups, size, penalty):
    model = make_model()
    for prompt in PROMPTS[:2]:
        found = search(
            model, prompt, 5, num_beams=groups * size, num_beam_groups=groups, diversity_penalty=penalty,
            num_return_sequences=groups * size,
        )  # fmt: skip
        expected = diverse_by_definition(model, prompt, 5, groups, size, penalty)
        assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-4)
        assert sorted(one.new_ids for one in found) == sorted(ids for ids, _ in expected)


def test_groups_that_are_far_apart_say_different_things(make_model):
    found = search(make_model(), [5], 6, num_beams=4, num_beam_groups=4, diversity_penalty=1e6,
                   num_return_sequences=4)  # fmt: skip
    for step in range(6):
        assert len({one.new_ids[step] for one in found}) == 4


def test_wide_enough_beams_find_the_best_sequence(make_model):
    """Against every sequence there is."""
    model = make_model(vocab_size=8)
    best = (-math.inf, [])
    for first in range(8):
        for second in range(8):
            score = float(logprobs_after(model, [5])[first] + logprobs_after(model, [5, first])[second])
            best = max(best, (score, [first, second]))
    found = search(model, [5], 2, num_beams=8, length_penalty=0.0)[0]
    assert found.new_ids == best[1] and found.score == pytest.approx(best[0], abs=1e-5)


def test_beams_share_the_prompts_pages(make_model):
    access = Access(make_model(), num_pages=13, page_size=4)
    request = GenerationRequest(list(range(1, 33)))
    beam_search(access, request, SearchOptions(num_beams=3), 32 + 4)  # of 9 pages each they share 7
    assert access.is_clean


def test_too_little_memory_says_so_and_gives_all_back(make_model):
    access = Access(make_model(), num_pages=10, page_size=4)
    with pytest.raises(MtnlgError, match="cache_gib"):
        beam_search(access, GenerationRequest(list(range(1, 33))), SearchOptions(num_beams=5), 42)
    assert access.is_clean


def test_a_constraint_holds_for_every_beam_and_ends_them(make_model):
    class Even:
        def __init__(self, count=0):
            self.count = count

        def start(self):
            return Even()

        def fill_mask(self, bitmask):
            bitmask.fill_(0x55555555)

        def accept(self, token):
            assert token % 2 == 0
            self.count += 1

        @property
        def is_complete(self):
            return self.count == 3

        def copy(self):
            return Even(self.count)

    access = Access(make_model())
    request = GenerationRequest([5, 9], constraint=Even())
    found = beam_search(access, request, SearchOptions(num_beams=3, num_return_sequences=3), 20)
    assert {len(one.new_ids) for one in found} == {3}
    assert {one.finish_reason for one in found} == {"stop"}
    assert all(token % 2 == 0 for one in found for token in one.new_ids)


def test_what_a_search_cannot_do_is_refused(make_model):
    access = Access(make_model())
    for bad in (dict(rules=SamplingRules(0.7)), dict(stop=["x"]), dict(logprobs=2)):
        with pytest.raises(ConfigError, match="search"):
            beam_search(access, GenerationRequest([1], **bad), SearchOptions(num_beams=2), 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(num_beams=0), "num_beams"),
        (dict(num_beams=4, num_beam_groups=3), "groups must be equal"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences"),
        (dict(num_beams=2, diversity_penalty=0.5), "num_beam_groups"),
        (dict(num_beams=2, length_penalty=math.nan), "length_penalty"),
        (dict(num_beams=2, early_stopping="soon"), "early_stopping"),
        (dict(num_beams=2, penalty_alpha=0.5), "contrastive"),
        (dict(penalty_alpha=1.5), "penalty_alpha"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        SearchOptions(**options)

"""Contrastive search beside its definition (arXiv 2202.06417), without pages or shortcuts."""

from __future__ import annotations

import pytest
import torch
from tests.generation.test_beam import Access

from mtnlg.config import ConfigError, MtnlgError
from mtnlg.generation import GenerationRequest, SamplingRules
from mtnlg.generation.contrastive import contrastive_search
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.runner import PlainRunner
from mtnlg.generation.search import SearchOptions

PROMPTS = [[5, 9, 2], [7], list(range(1, 20))]


class RunsOnce(PlainRunner):
    """Whose steps give hidden states alone."""

    def run(self, rows):
        raise AssertionError("a second pass")


class OverRanks(PlainRunner):
    """Whose head is elsewhere."""

    def logits_of(self, hidden):
        return None


def fast(model, num_pages, page_size):
    return FastRunner(model, num_pages, page_size)


def search(model, prompt, max_new=8, alpha=0.6, top_k=4, make_runner=RunsOnce, **request):
    access = Access(model)
    access.runner = make_runner(model, access.books.num_pages, access.books.page_size)
    options = SearchOptions(penalty_alpha=alpha, top_k=top_k)
    try:
        return contrastive_search(
            access, GenerationRequest(prompt, **request), options, len(prompt) + max_new
        )
    finally:
        assert access.is_clean


@torch.no_grad()
def states_and_logits(model, ids):
    """Hidden states after the final norm [tokens, hidden], and the logits of the next token."""
    head, model.head = model.head, None
    try:
        hidden = model(torch.tensor([ids])).hidden[0]
    finally:
        model.head = head
    normed = head.norm(hidden)
    return normed, head.output(normed[-1])


def by_definition(model, prompt, steps, alpha, top_k, rules=None):
    ids, total = list(prompt), 0.0
    for _ in range(steps):
        said, logits = states_and_logits(model, ids)
        if rules is not None:
            for token in set(ids):
                penalty = rules.repetition_penalty
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        probabilities = logits.softmax(-1)
        best = None
        for token in probabilities.topk(top_k).indices.tolist():
            new = states_and_logits(model, [*ids, token])[0][-1]
            likeness = max(float(torch.cosine_similarity(new, old, dim=0)) for old in said)
            score = (1 - alpha) * float(probabilities[token]) - alpha * likeness
            if best is None or score > best[0]:
                best = (score, token)
        total += best[0]
        ids.append(best[1])
    return ids[len(prompt) :], total


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.2, 8), (1.0, 3)])
def test_tokens_and_scores_are_those_of_the_definition(make_model, family, alpha, top_k):
    model = make_model(family)
    for prompt in PROMPTS:
        ids, score = by_definition(model, prompt, 8, alpha, top_k)
        for make_runner in (RunsOnce, OverRanks, fast):
            found = search(model, prompt, 8, alpha, top_k, make_runner)
            assert found.new_ids == ids
            assert found.score == pytest.approx(score, abs=1e-4)
            assert found.finish_reason == "length"


def test_penalties_change_the_probabilities(make_model):
    model, rules = make_model(), SamplingRules(repetition_penalty=1.8)
    found = search(model, PROMPTS[0], 8, rules=rules)
    assert found.new_ids == by_definition(model, PROMPTS[0], 8, 0.6, 4, rules)[0]
    assert found.new_ids != search(model, PROMPTS[0], 8).new_ids


@pytest.mark.parametrize(("alpha", "top_k"), [(0.0, 5), (0.7, 1)])
def test_without_a_penalty_or_a_choice_it_is_greedy(make_model, alpha, top_k):
    model = make_model()
    ids = list(PROMPTS[0])
    for _ in range(8):
        ids.append(int(states_and_logits(model, ids)[1].argmax()))
    assert search(model, PROMPTS[0], 8, alpha, top_k).new_ids == ids[3:]


def test_it_ends_at_an_end_token_and_not_before_the_least(make_model):
    model = make_model()
    free = search(model, PROMPTS[0], 8).new_ids
    ended = search(model, PROMPTS[0], 8, end_ids=[free[2]])
    assert ended.new_ids == free[: free.index(free[2]) + 1] and ended.finish_reason == "end"
    later = search(model, PROMPTS[0], 8, end_ids=[free[2]], min_new_tokens=6)
    assert free[2] not in later.new_ids[:6] and len(later.new_ids) > 5


def test_what_cannot_be_is_refused_and_leaves_no_page_behind(make_model):
    model = make_model()
    with pytest.raises(ConfigError, match="search"):
        search(model, [1], rules=SamplingRules(0.5))
    with pytest.raises(MtnlgError, match="no token"):
        everything = tuple((token, float("-inf")) for token in range(67))
        search(model, [1], rules=SamplingRules(logit_bias=everything))
    with torch.no_grad():
        model.head.norm.weight.fill_(float("nan"))
    with pytest.raises(MtnlgError, match="not finite"):
        search(model, [1])

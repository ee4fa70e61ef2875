"""Whole runs of the engine beside transformers on the same weights."""

from __future__ import annotations

import pytest
import torch

from mtnlg.generation import SamplingRules, generate
from mtnlg.generation.generate import run_together
from mtnlg.generation.keeper import EngineKeeper
from mtnlg.generation.request import GenerationRequest
from mtnlg.interop import write_hugging_face

transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 9, 2, 5, 9], [7], list(range(1, 19))]
PADDING = 66
RULES = {
    "greedy": {},
    "repetition": dict(repetition_penalty=1.5),
    "encouraged": dict(repetition_penalty=0.8),
    "n-grams": dict(no_repeat_ngram_size=2),
    "bias": dict(logit_bias=((3, 4.0), (20, -4.0))),
    "all": dict(repetition_penalty=1.2, no_repeat_ngram_size=3, logit_bias=((11, 3.0),)),
}


@pytest.fixture(scope="module", params=["gpt", "llama"])
def twins(request, tmp_path_factory):
    from tests.generation.conftest import FAMILIES

    from mtnlg.config import MegatronModelConfig
    from mtnlg.model import MegatronLmDecoder, initialize_weights

    shape = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=48, init_method_std=0.3)  # fmt: skip
    config = MegatronModelConfig(**{**shape, **FAMILIES[request.param]})
    ours = MegatronLmDecoder(config)
    initialize_weights(ours, config, seed=3)
    folder = tmp_path_factory.mktemp(request.param)
    write_hugging_face(ours.eval(), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = PADDING
    return ours, theirs


def expected_of(theirs, prompt, max_new, end_ids, least, rules):
    options = {name: value for name, value in rules.items() if name != "logit_bias"}
    if "logit_bias" in rules:
        options["sequence_bias"] = {(token,): bias for token, bias in rules["logit_bias"]}
    if end_ids:
        options |= {"eos_token_id": list(end_ids), "min_new_tokens": least}
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new, do_sample=False, pad_token_id=PADDING, **options,
        )  # fmt: skip
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", RULES)
def test_greedy_runs_with_rules_are_those_of_transformers(twins, name):
    ours, theirs = twins
    found = generate(ours, PROMPTS, SamplingRules(**RULES[name]), max_new_tokens=14)
    for prompt, one in zip(PROMPTS, found):
        assert one.new_ids == expected_of(theirs, prompt, 14, (), 0, RULES[name])


def test_the_least_number_of_tokens_is_that_of_transformers(twins):
    ours, theirs = twins
    ends = tuple(range(0, 60, 2))
    engine = EngineKeeper().engine(ours, None)
    for least in (0, 3, 9):
        requests = [
            GenerationRequest(prompt, max_new_tokens=12, end_ids=ends, min_new_tokens=least)
            for prompt in PROMPTS
        ]
        for prompt, one in zip(PROMPTS, run_together(engine, requests)):
            assert one.new_ids == expected_of(theirs, prompt, 12, ends, least, {})
            assert len(one.new_ids) > least

"""Against sums made by hand in float64, one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtnlg.config import BlendEntry, ConfigError, DataConfig, DataError, MegatronModelConfig, RunConfig
from mtnlg.config.load import save_run_config
from mtnlg.evaluation import (
    EvaluationDocument,
    EvaluationText,
    Score,
    evaluate_files,
    evaluate_perplexity,
    evaluate_run,
    texts_of_run,
)
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import TokenFileWriter, Tokenizer

TEXTS = ["秋天的夜晚，星光闪烁。", "The night was quiet.", "", "Stars 🌙, and 月 again and again."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model() -> MegatronLmDecoder:
    config = MegatronModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        init_method_std=0.25,
    )
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=0)
    return model


def nll_by_hand(
    model: MegatronLmDecoder, ids: list[int], end: int, window: int, stride: int, reset: bool = False
) -> float:
    """Each token from its own pass over exactly the context that the policy gives it, in float64."""
    exact = MegatronLmDecoder(model.config).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    joined = [end, *ids]
    total = 0.0
    for target in range(1, len(joined)):
        number = 0 if target <= window else math.ceil((target - window) / stride)
        context = joined[number * stride : target]
        if reset and end in context[:-1]:
            last = max(place for place, token in enumerate(context[:-1]) if token == end)
            context = context[last + 1 :]
        with torch.no_grad():
            logits = exact(torch.tensor([context])).logits[0, -1]
        total -= float(logits.log_softmax(dim=-1)[joined[target]])
    return total


def all_ids(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_text_id]]


def text_of(tokenizer: Tokenizer, texts: list[str]) -> EvaluationText:
    documents = [
        EvaluationDocument(np.array(all_ids(tokenizer, [text])), len(text.encode()), len(text))
        for text in texts
    ]
    return EvaluationText("by hand", documents)


@pytest.mark.parametrize(("window", "stride"), [(24, 24), (10, 10), (24, 7), (5, 1), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_sum_equals_the_sum_by_hand(model, tokenizer, window, stride, batch_size):
    result = evaluate_perplexity(
        model, tokenizer, [text_of(tokenizer, TEXTS)], window=window, stride=stride, batch_size=batch_size
    )
    ids = all_ids(tokenizer, TEXTS)
    expected = nll_by_hand(model, ids, tokenizer.end_of_text_id, window, stride)
    assert result.total.nll == pytest.approx(expected, rel=1e-5)
    assert result.total.num_tokens == len(ids)
    assert result.total.num_documents == 4


def test_documents_that_start_anew_are_scored_alone(model, tokenizer):
    result = evaluate_perplexity(
        model, tokenizer, [text_of(tokenizer, TEXTS)], window=20, reset_at_document_boundaries=True
    )
    ids = all_ids(tokenizer, TEXTS)
    expected = nll_by_hand(model, ids, tokenizer.end_of_text_id, 20, 20, reset=True)
    assert result.total.nll == pytest.approx(expected, rel=1e-5)


def test_the_ratios_are_what_their_names_say(model, tokenizer):
    total = evaluate_perplexity(model, tokenizer, [text_of(tokenizer, TEXTS)]).total
    joined = "".join(TEXTS)
    assert total.perplexity == pytest.approx(math.exp(total.nll / total.num_tokens))
    assert total.bits_per_byte == pytest.approx(total.nll / math.log(2) / len(joined.encode()))
    assert total.bits_per_character == pytest.approx(total.nll / math.log(2) / len(joined))


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(model, tokenizer):
    flat = MegatronLmDecoder(model.config)
    for parameter in flat.parameters():
        torch.nn.init.zeros_(parameter)
    total = evaluate_perplexity(flat, tokenizer, [text_of(tokenizer, TEXTS)]).total
    assert total.perplexity == pytest.approx(300, rel=1e-5)


def test_sources_are_scored_apart_and_together(model, tokenizer):
    texts = [text_of(tokenizer, TEXTS[:2]), text_of(tokenizer, TEXTS[2:])]
    result = evaluate_perplexity(model, tokenizer, texts)
    first, second = result.sources.values()
    assert result.total.nll == first.nll + second.nll
    assert len(result.sources) == 2


def test_the_result_is_json(model, tokenizer):
    result = evaluate_perplexity(model, tokenizer, [text_of(tokenizer, TEXTS)], window=8)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["window"] == found["stride"] == 8
    assert found["bits_per_byte"] == found["sources"]["by hand"]["bits_per_byte"]
    assert Score(nll=1e6, num_tokens=1).to_dict()["perplexity"] is None


def test_progress_and_mode(model, tokenizer):
    told: list[tuple[Any, ...]] = []
    model.train()
    evaluate_perplexity(
        model,
        tokenizer,
        [text_of(tokenizer, TEXTS)],
        batch_size=1,
        progress=lambda stage, done, total, unit="": told.append((stage, done, total, unit)),
    )
    assert model.training
    assert told[-1] == ("evaluating by hand", len(all_ids(tokenizer, TEXTS)), None, "tokens")
    assert len(told) > 1


# -- files and runs


def test_files_are_read_as_training_reads_them(model, tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text))
    result = evaluate_files(model, tokenizer, [str(path)], window=16)
    expected = evaluate_perplexity(
        model, tokenizer, [text_of(tokenizer, [text for text in TEXTS if text])], window=16
    )
    assert list(result.sources) == ["texts.jsonl"]
    assert result.total.nll == expected.total.nll
    limited = evaluate_files(model, tokenizer, [str(path)], max_tokens=9)
    assert limited.total.num_tokens == 9


def make_run(folder: Path, tokenizer: Tokenizer, config: MegatronModelConfig, **data: Any) -> None:
    texts = [f"第{number}首，star {number}" for number in range(10)]
    writer = TokenFileWriter(str(folder / "data" / "poems"), vocab_size=300)
    for text in texts:
        writer.add_document(np.array(all_ids(tokenizer, [text])))
    writer.close()
    fields = dict(
        blend=[BlendEntry(str(folder / "data" / "poems"))], sequence_length=12, split="6,3,1", **data
    )
    save_run_config(RunConfig(model=config, data=DataConfig(**fields)), folder / "config.yaml")


@pytest.mark.parametrize(("split", "documents"), [("train", 6), ("valid", 3), ("test", 1), ("all", 10)])
def test_a_split_of_a_run(model, tokenizer, tmp_path, split, documents):
    (tmp_path / "data").mkdir()
    make_run(tmp_path, tokenizer, model.config)
    result = evaluate_run(model, tokenizer, tmp_path, split)
    first = {"train": 0, "valid": 6, "test": 9, "all": 0}[split]
    texts = [f"第{number}首，star {number}" for number in range(first, first + documents)]
    expected = evaluate_perplexity(model, tokenizer, [text_of(tokenizer, texts)], window=12)
    assert result.total == expected.total
    assert result.window == 12


def test_the_corpora_of_a_blend_are_told_apart(model, tokenizer, tmp_path):
    blend, expected = [], []
    for name, text in (("first", TEXTS[0]), ("second", TEXTS[3])):
        writer = TokenFileWriter(str(tmp_path / name), vocab_size=300)
        writer.add_document(np.array(all_ids(tokenizer, [text])))
        writer.close()
        blend.append(BlendEntry(str(tmp_path / name)))
        expected.append(
            evaluate_perplexity(model, tokenizer, [text_of(tokenizer, [text])], window=12).total
        )
    config = RunConfig(model=model.config, data=DataConfig(blend=blend, sequence_length=12))
    found = evaluate_perplexity(model, tokenizer, texts_of_run(config, tokenizer, "all"), window=12)
    assert found.sources == dict(zip(("first", "second"), expected))


def test_a_run_that_was_moved_and_one_that_starts_documents_anew(model, tokenizer, tmp_path):
    before = tmp_path / "before"
    (before / "data").mkdir(parents=True)
    make_run(before, tokenizer, model.config, reset_at_document_boundaries=True)
    moved = before.rename(tmp_path / "after")
    result = evaluate_run(model, tokenizer, moved)
    texts = [f"第{number}首，star {number}" for number in range(6, 9)]
    expected = evaluate_perplexity(
        model, tokenizer, [text_of(tokenizer, texts)], window=12, reset_at_document_boundaries=True
    )
    assert result.total == expected.total


def test_bad_options_are_all_named(model, tokenizer):
    with pytest.raises(ConfigError) as caught:
        evaluate_perplexity(model, tokenizer, [], window=25, stride=30, batch_size=0)
    assert [problem.split()[0] for problem in caught.value.problems] == ["window", "stride", "batch_size"]


def test_nothing_to_evaluate_on(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no token"):
        evaluate_perplexity(model, tokenizer, [])
    with pytest.raises(DataError, match="no token files"):
        texts_of_run(RunConfig(), tokenizer)
    (tmp_path / "data").mkdir()
    make_run(tmp_path, tokenizer, model.config)
    with pytest.raises(ConfigError, match="'dev' does not exist: choose one of train"):
        evaluate_run(model, tokenizer, tmp_path, "dev")


def test_tokens_of_another_vocabulary_are_refused(model, tokenizer):
    text = EvaluationText("x", [EvaluationDocument(np.array([300]), 1, 1)])
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_perplexity(model, tokenizer, [text])


def test_an_empty_split_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    make_run(tmp_path, tokenizer, model.config)
    from mtnlg.config.load import load_run_config

    config = load_run_config(tmp_path / "config.yaml", ["--data.split=1,0,0"])
    with pytest.raises(DataError, match="validation split is empty"):
        texts_of_run(config, tokenizer)

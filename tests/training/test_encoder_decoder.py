"""Encoder-decoders in the trainer: from raw text, in layouts, over checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.parallel.parity import T5
from tests.tokens.texts import TEXTS
from tests.training.helpers import Recorder, small_config, train_here, train_laid_out

from mtnlg.config import (
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    MegatronModelConfig,
    RunConfig,
    SourceEntry,
    StopConfig,
    TokenizerConfig,
)
from mtnlg.config.objective import ObjectiveConfig
from mtnlg.training.prepare import prepare

IDS = dict(sentinel_ids="36-30", end_id=1, padding_id=0)
UL2 = ["spans 0.2 2 x2", "suffix 0.25", "prefix 0.5"]


def run_of(folder: Path, objective: ObjectiveConfig, **sections) -> RunConfig:
    config = small_config(folder)
    data = replace(config.data, objective=objective)
    sections = {"model": MegatronModelConfig(**T5), "data": data, **sections}
    return replace(config, **sections)


def test_it_learns_from_text_and_writes_what_is_missing(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 20), encoding="utf-8")
    config = run_of(
        tmp_path,
        ObjectiveConfig(),
        data=DataConfig(
            sources=[SourceEntry(str(tmp_path / "text.txt"))],
            objective=ObjectiveConfig("span_corruption"),
            sequence_length=32,
            split="8,2,0",
        ),
        tokenizer=TokenizerConfig(vocab_size=500, sets_vocab_size=True),
        evaluation=EvaluationConfig(4, 2, ["人工<extra_id_0>未来"], sample_tokens=5),
        stop=StopConfig(steps=8),
    )
    recorder = Recorder()
    train_here(prepare(config), recorder)
    assert recorder.steps[-1].loss < recorder.steps[0].loss
    assert [line.step for line in recorder.validations] == [4, 8]
    samples = (Path(config.run_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [4, 8]
    assert all(step.mfu > 0.0 for step in recorder.steps)


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"name": "span_corruption"}, {"pipeline_parallel_size": 2}),
        ({"name": "ul2", "denoisers": UL2, "target_length": 12}, {"tensor_parallel_size": 2}),
        ({"name": "prefix_lm"}, {"data_parallel_size": 2, "data_parallel_sharding": "zero3"}),
    ],
)
def test_a_layout_goes_on_with_a_run_of_one_process(ranks, tmp_path, fields, layout):
    config = run_of(tmp_path, ObjectiveConfig(**fields, **IDS))
    whole = Recorder()
    train_here(config, whole)
    again = replace(config, run_dir=str(tmp_path / "again"), stop=StopConfig(steps=2))
    Path(again.run_dir).mkdir()
    train_here(again)
    sizes = {"data_parallel_size": 1, **layout}
    again = replace(again, layout=LayoutConfig(**sizes), stop=StopConfig(steps=6))
    there = ranks.run(2, train_laid_out, again)[0]
    expected = {step.step: step.loss for step in whole.steps[2:]}
    assert there["losses"] == pytest.approx(expected, rel=1e-5)
    assert there["result"].validation_loss == pytest.approx(whole.validations[-1].loss, rel=1e-5)

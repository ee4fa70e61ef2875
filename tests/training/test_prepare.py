"""From raw text to a run's folder, once; and the whole way through ``train``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.training.helpers import Recorder, small_config, train_here

from mtnlg.config import (
    BlendEntry,
    CheckpointError,
    ConfigError,
    DataConfig,
    DataError,
    EvaluationConfig,
    LayoutConfig,
    SourceEntry,
    StopConfig,
    TokenizerConfig,
)
from mtnlg.config.load import load_run_config
from mtnlg.tokens.token_file import TokenFile
from mtnlg.tokens.tokenizer import Tokenizer
from mtnlg.training import prepare, train

VERSES = ["明月松間照，清泉石上流。", "竹喧歸浣女，蓮動下漁舟。"]
LINES = [f"line {number} of a text that says little, {number * 7} times" for number in range(120)]


@pytest.fixture
def config(tmp_path):
    """A run from two raw sources, with a tokenizer of its own."""
    with open(tmp_path / "poems.jsonl", "w", encoding="utf-8") as file:
        for number in range(80):
            file.write(json.dumps({"paragraphs": [VERSES[number % 2]] * 2}, ensure_ascii=False) + "\n")
    with open(tmp_path / "lines.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in LINES)
    sources = [
        SourceEntry(str(tmp_path / "poems.jsonl"), text_key="paragraphs"),
        SourceEntry(str(tmp_path / "lines.jsonl")),
    ]
    return replace(
        small_config(tmp_path),
        data=DataConfig(sources=sources, sequence_length=16, split="8,2,0"),
        tokenizer=TokenizerConfig(vocab_size=320, sets_vocab_size=True),
    )


def times(run_dir: str) -> dict[str, int]:
    names = ("tokenizer/tokenizer.json", "data/00-poems.bin", "data/01-lines.bin")
    return {name: (Path(run_dir) / name).stat().st_mtime_ns for name in names}


def test_prepare_makes_tokenizer_token_files_and_config(config):
    prepared = prepare(config)
    run_dir = Path(config.run_dir)
    tokenizer = Tokenizer.from_pretrained(run_dir / "tokenizer")
    assert prepared.model.vocab_size == tokenizer.vocab_size <= 320
    assert [Path(entry.path).name for entry in prepared.data.blend] == ["00-poems", "01-lines"]
    poems = TokenFile(prepared.data.blend[0].path)
    assert tokenizer.decode(poems[0]) == "\n".join([VERSES[0]] * 2)
    assert prepared.data.blend[0].weight == poems.num_tokens
    assert load_run_config(run_dir / "config.yaml") == prepared


def test_tokens_of_a_prepared_run_hold_so_many_han_characters(config):
    """And another number of them is another tokenizer, though the sources are the same."""
    for most in (2, 1, 2):
        learned = replace(config.tokenizer, vocab_size=420, han_characters=most)
        prepare(replace(config, tokenizer=learned))
        tokenizer = Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer")
        texts = (tokenizer.decode([number]) for number in range(tokenizer.vocab_size))
        assert max(sum("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts) == most
    with pytest.raises(ConfigError, match="han_characters is 0"):
        TokenizerConfig(han_characters=0)


def test_prepare_does_nothing_twice(config):
    prepared = prepare(config)
    before = times(config.run_dir)
    assert prepare(config) == prepared
    assert prepare(load_run_config(Path(config.run_dir) / "config.yaml")) == prepared
    assert times(config.run_dir) == before


def test_changed_source_is_encoded_anew_until_the_run_has_begun(config, tmp_path):
    prepare(config)
    before = times(config.run_dir)
    with open(tmp_path / "lines.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    train(config)
    assert all(times(config.run_dir)[name] != before[name] for name in before)
    with open(tmp_path / "lines.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "and another"}) + "\n")
    with pytest.raises(DataError, match="has changed since the run"):
        train(config)
    assert train(config, fresh=True).step == 6


def test_interrupted_preparation_goes_on(config, monkeypatch):
    import mtnlg.tokens.encode as encode

    original, calls = encode.encode_files, []

    def fail_at_second(sources, *args, **kwargs):
        calls.append(Path(sources[0]).name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(sources, *args, **kwargs)

    monkeypatch.setattr(encode, "encode_files", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    prepare(config)
    assert calls == ["poems.jsonl", "lines.jsonl", "lines.jsonl"]


def test_train_goes_the_whole_way_and_on(config):
    config = replace(config, evaluation=EvaluationConfig(3, 2, prompts=["明月", "line"], sample_tokens=5))
    recorder = Recorder()
    result = train(config, [recorder])
    assert result.step == 6 and result.validation_loss is not None
    assert [metrics.step for metrics in recorder.validations] == [3, 6]
    lines = (Path(config.run_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(sample["step"], sample["prompt"]) for sample in map(json.loads, lines)]
    assert found == [(3, "明月"), (3, "line"), (6, "明月"), (6, "line")]
    again = replace(load_run_config(Path(config.run_dir) / "config.yaml"), stop=StopConfig(steps=7))
    assert train(again).step == 7


def test_train_starts_its_own_ranks(config):
    """Two stages on this machine, continued from one process; also gathers the model for samples."""
    train(config)
    layout = LayoutConfig(pipeline_parallel_size=2)
    evaluation = EvaluationConfig(0, 2, prompts=["明月"], sample_tokens=3)
    more = replace(config, layout=layout, stop=StopConfig(steps=7), evaluation=evaluation)
    result = train(more, [Recorder])
    saved = load_run_config(Path(config.run_dir) / "config.yaml").layout
    assert (saved.pipeline_parallel_size, saved.data_parallel_size) == (2, None)  # left open
    assert (result.step, result.stop_reason) == (7, "steps")
    assert "明月" in (Path(config.run_dir) / "samples.jsonl").read_text(encoding="utf-8")


def test_refused_config_does_not_replace_the_runs(config):
    train(config)
    saved = (Path(config.run_dir) / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="num_hidden_layers was 3 and is 4"):
        train(replace(config, model=replace(config.model, num_hidden_layers=4)))
    assert (Path(config.run_dir) / "config.yaml").read_text(encoding="utf-8") == saved


def test_nothing_to_train_on_is_said(tmp_path):
    config = small_config(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.sources .* or data\.blend"):
        prepare(replace(config, data=DataConfig(sequence_length=16)))


def test_token_files_need_their_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        prepare(small_config(tmp_path))


def test_vocabulary_of_the_model_must_hold_the_tokenizers(config):
    prepared = prepare(config)
    tokenizer = replace(prepared.tokenizer, sets_vocab_size=False)
    larger = replace(prepared, model=replace(prepared.model, vocab_size=400), tokenizer=tokenizer)
    assert prepare(larger).model.vocab_size == 400
    smaller = replace(prepared, model=replace(prepared.model, vocab_size=30), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="the tokenizer has"):
        prepare(smaller)


def test_token_files_of_another_tokenizer_are_refused(config, tmp_path):
    from mtnlg.tokens.token_writer import TokenFileWriter

    prepared = prepare(config)
    with TokenFileWriter(tmp_path / "other", 1000) as writer:
        writer.add_document([5, 999])
    blend = [BlendEntry(str(tmp_path / "other"))]
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(replace(prepared, data=replace(prepared.data, blend=blend)))


def test_a_token_that_the_model_does_not_have_stops_training(tmp_path):
    config = small_config(tmp_path)
    smaller = replace(config.model, vocab_size=config.model.vocab_size // 2)
    with pytest.raises(DataError, match="another tokenizer"):
        train_here(replace(config, model=smaller))


def test_broken_source_names_file_and_line(config, tmp_path):
    with open(tmp_path / "lines.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "half\n')
    with pytest.raises(DataError, match=r"lines\.jsonl.*121"):
        prepare(config)

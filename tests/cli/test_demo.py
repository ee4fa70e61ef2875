import json
from dataclasses import replace

import pytest

from mtnlg.cli.main import main
from mtnlg.config import BatchConfig, TokenizerConfig, demo
from mtnlg.config.load import load_run_config
from mtnlg.corpus import demo_sources

PARTS = ("held-out text", "What it writes", "Next:", "mtnlg generate")


@pytest.fixture
def small(monkeypatch):
    """The demo with a model and corpora that a test can wait for."""
    whole = demo.demo_config

    def config(*arguments):
        config = whole(*arguments)
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        return replace(
            config,
            model=replace(config.model, **shape),
            tokenizer=TokenizerConfig(vocab_size=500, sets_vocab_size=True),
            data=replace(config.data, sequence_length=32),
            batch=BatchConfig(micro_batch_size=4, global_batch_size=4),
        )

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(demo, "DEMO_PROMPTS", {"春": 4, "def": 4})
    monkeypatch.setattr(demo_sources, "CODE_BYTES", 60_000)
    monkeypatch.setattr(demo_sources, "TOPIC_BYTES", 60_000)


def test_the_demo_goes_all_the_way_and_again_at_once(small, tmp_path, capsys):
    run = tmp_path / "demo"
    words = ["demo", "--minutes", "0.02", "--run-dir", str(run)]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert all(part in first for part in PARTS)
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "samples.txt").read_text("utf-8").startswith("春")
    values = json.loads((run / "demo.json").read_text("utf-8"))
    assert len(values["test"]["sources"]) == 3
    metrics = (run / "metrics.jsonl").read_bytes()

    assert main(words) == 0
    again = capsys.readouterr().out
    assert "is finished" in again
    assert all(part in again for part in PARTS)
    assert (run / "metrics.jsonl").read_bytes() == metrics

    (run / "demo.json").unlink()  # as if it had been killed while evaluating
    assert main(words) == 0
    capsys.readouterr()
    assert json.loads((run / "demo.json").read_text("utf-8"))["steps"] == values["steps"]

    assert main(["demo", "--minutes", "0.04", "--run-dir", str(run)]) == 0
    captured = capsys.readouterr()
    assert f"going on from step {values['steps']}" in captured.err
    assert json.loads((run / "demo.json").read_text("utf-8"))["steps"] > values["steps"]

    assert main([*words, "--force"]) == 0
    assert "going on" not in capsys.readouterr().err


def test_the_config_of_the_demo_is_a_recipe_like_any_other(tmp_path):
    from mtnlg.config.load import save_run_config

    config = demo.demo_config("runs/demo", "en.jsonl", "code.jsonl", "zh.jsonl")
    save_run_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config
    assert len(demo.demo_config("runs/demo", "en.jsonl", "code.jsonl").data.sources) == 2

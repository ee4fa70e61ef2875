"""Every example of docs/python-api.md runs, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python-api.md"

RECIPE = """
run_dir: runs/poems
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}
tokenizer: {vocab_size: 300}
data: {sources: [{path: poems.jsonl}], sequence_length: 16, split: "60,20,20"}
batch: {micro_batch_size: 2, global_batch_size: 2}
stop: {steps: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run called ``runs/poems`` with its recipe and texts."""
    from mtnlg.config.load import load_run_config
    from mtnlg.training import train

    monkeypatch.chdir(tmp_path)
    lines = [f'{{"text": "秋夜第{number}首，星光闪烁。"}}' for number in range(20)]
    Path("poems.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("poems.txt").write_text("秋天的夜晚，星光闪烁。" * 3, encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    train(load_run_config("recipe.yaml"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:more tokens were asked for")
def test_the_examples_run(folder, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 10
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, example {number}", "exec"), names)
    assert "529600819200" in capsys.readouterr().out
    for name, expected in (("model", MegatronLmModel), ("tokenizer", Tokenizer)):
        assert isinstance(names[name], expected)
    assert isinstance(names["giant"].config, MegatronModelConfig)  # type: ignore[attr-defined]
    assert names["text"].startswith("秋天的夜晚")  # type: ignore[attr-defined]

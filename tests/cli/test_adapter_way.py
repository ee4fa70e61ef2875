"""An adapter from end to end on the command line: tuned, merged, exported, brought by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tuning.helpers import conversations, write_base, write_lines

from mtnlg import MegatronLmModel
from mtnlg.cli.main import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(5, 14)[None]
TARGETS = ["attention.query", "mlp.down", "embedding.tokens", "head.output"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("way") / "base")


def theirs(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def test_a_tuned_adapter_leaves_merged_and_alone(base: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "chats.jsonl", conversations(8))
    run = tmp_path / "run"
    words = ["--method", "lora", "--out", str(run), "--stop.steps", "2", "--learning-rate", "0.05"]
    words += ["--tuning.adapter.target_modules", str(TARGETS), "--data.sequence_length", "48"]
    assert main(["tune", str(base), str(data), *words]) == 0
    tuned = MegatronLmModel.from_pretrained(run)
    logits = tuned(IDS).logits
    assert not torch.allclose(logits, MegatronLmModel.from_pretrained(base)(IDS).logits, atol=1e-2)
    for model, form in ((run, "hf"), (run / "adapter", "peft")):
        assert main(["export", str(model), "--format", form, "--out", str(tmp_path / form)]) == 0
    merged = theirs(tmp_path / "hf")
    assert not merged.config.tie_word_embeddings
    alone = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "peft").eval()
    for model in (merged, alone):
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "again")]) == 0
    again = MegatronLmModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, logits)


def test_a_whole_model_is_no_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), "--format", "peft", "--out", str(tmp_path / "out")]) == 2
    assert "is a whole model and no adapter" in capsys.readouterr().err


def test_an_adapter_of_others_is_spoken_with(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "lm_head"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(theirs(base), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    made.save_pretrained(tmp_path / "theirs")
    words = ["generate", str(base), "red one", "--max-new-tokens", "6", "--greedy"]
    assert main([*words, "--adapter", str(tmp_path / "theirs")]) == 0
    said = capsys.readouterr().out
    model = MegatronLmModel.from_pretrained(base)
    model.add_adapter(tmp_path / "theirs")
    torch.testing.assert_close(made.eval()(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert said.strip() == model.generate("red one", max_new_tokens=6, temperature=0.0).strip()

"""Adapters of encoder-decoders beside PEFT's: the same loss and gradients, files read both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.test_encoder_decoder_families import LABELS, MASK, SOURCE, make_theirs
from tests.interop.test_peft import our_gradients, their_gradients

from mtnlg import MegatronEncoderDecoderModel
from mtnlg.config.adapter import AdapterConfig

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "task_type": "SEQ_2_SEQ_LM"}
# Cross attention's matrices are among those named q, k, v and o.
CASES: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(**LORA, target_modules=["q", "v", "wi_0", "wo"]),
    "dora": lambda: peft.LoraConfig(**LORA, target_modules=["EncDecAttention.k", "o"], use_dora=True),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    make_theirs(transformers, "t5-1.1", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_files_are_those_of_peft(base: Path, tmp_path: Path, case: str) -> None:
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    theirs = peft.get_peft_model(plain, CASES[case]()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MegatronEncoderDecoderModel.from_pretrained(base)
    ours.add_adapter(tmp_path / "theirs")
    expected = theirs(input_ids=SOURCE, attention_mask=MASK, labels=LABELS)
    loss = ours(SOURCE, labels=LABELS, attention_mask=MASK).loss / (LABELS != -100).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    expected.loss.backward()
    loss.backward()
    wanted, found = their_gradients(theirs), our_gradients(ours)
    assert wanted.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        rows = found[name]
        padded = torch.zeros_like(gradient)
        padded[: len(rows)] = rows  # PEFT keeps virtual tokens for a decoder too, and reads none
        assert float((padded - gradient).abs().max()) <= 1e-5 * largest, name
    ours.save_adapter(tmp_path / "ours", base=str(base))
    fresh = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    reread = again(input_ids=SOURCE, attention_mask=MASK, labels=LABELS)
    torch.testing.assert_close(reread.logits, expected.logits, rtol=1e-5, atol=1e-5)
    opened = MegatronEncoderDecoderModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(
        opened(SOURCE, labels=LABELS, attention_mask=MASK).loss,
        ours(SOURCE, labels=LABELS, attention_mask=MASK).loss,
    )


def test_an_update_goes_into_every_linear_layer_and_can_be_merged(base: Path) -> None:
    model = MegatronEncoderDecoderModel.from_pretrained(base)
    plain = model.generate(SOURCE, attention_mask=MASK, max_new_tokens=6)
    model.add_adapter(AdapterConfig(rank=2, target_modules=["all-linear"], decomposed=True))
    changed = [name for name, item in model.named_parameters() if item.requires_grad]
    assert any("cross_attention.key.low_rank" in name for name in changed)
    assert torch.equal(model.generate(SOURCE, attention_mask=MASK, max_new_tokens=6), plain)
    with torch.no_grad():
        for name in changed:
            model.get_parameter(name).add_(0.3)
    tuned = model.generate(SOURCE, attention_mask=MASK, max_new_tokens=6)
    logits = model(SOURCE, LABELS.clamp_min(0)).logits
    model.merge_adapter()
    torch.testing.assert_close(model(SOURCE, LABELS.clamp_min(0)).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(SOURCE, attention_mask=MASK, max_new_tokens=6), tuned)

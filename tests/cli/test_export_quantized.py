"""``mtnlg export --quantize``: what is written, and what is said where options do not fit."""

from __future__ import annotations

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.cli.export_quantized import quantize_config, read_batches
from mtnlg.cli.main import main
from mtnlg.config import ConfigError


@pytest.fixture
def folder(tmp_path):
    config = MegatronModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, init_method_std=0.2,
    )  # fmt: skip
    MegatronLmModel(config).save_pretrained(tmp_path / "model")
    return tmp_path


def export(folder, *words):
    return main(["export", str(folder / "model"), "--format", "hf", "--out", str(folder / "out"), *words])


def test_a_folder_is_written_that_opens_quantized(folder, capsys):
    assert export(folder, "--quantize", "{weights: int4, group_size: 16}") == 0
    assert f"next: mtnlg generate {folder / 'out'}" in capsys.readouterr().out
    found = MegatronLmModel.from_pretrained(folder / "out")
    expected = MegatronLmModel.from_pretrained(
        folder / "model", quantize=dict(weights="int4", group_size=16)
    )
    ids = torch.arange(9)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quantize", "int3"], "quantize_config.weights is 'int3'"),
        (["--quantize", "{bits: 4}"], "quantize_config.bits is not a setting"),
        (["--quantize", "[4]"], "--quantize is '[4]'"),
        (["--quantize", "int4", "--method", "gptq"], "gptq and awq need --calibrate"),
        (["--quantize", "int4", "--calibrate", "x.txt"], "rtn looks at no text"),
        (["--quantize", "int4", "--method", "awq", "--calibrate", "x.txt"], "needs the model's tokenizer"),
        (["--quantize", "int4", "--format", "gguf"], "for gguf say --precision q4_0"),
    ],
)
def test_what_does_not_fit_is_said(folder, capsys, words, said):
    assert export(folder, *words) == 2
    assert said in capsys.readouterr().err


def test_names_stand_for_their_numbers():
    assert quantize_config("int4").weights == "int4"
    assert quantize_config("{weights: int8, activations: int8}").activations == "int8"
    with pytest.raises(ConfigError):
        quantize_config("{")


class Words:
    def encode(self, text):
        return [int(word) for word in text.split()]


def test_calibration_text_becomes_batches(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(50))))
    batches = read_batches([str(path)], Words(), 8, 44)
    assert [list(batch.shape) for batch in batches] == [[4, 8], [1, 8]]
    assert torch.cat(batches).flatten().tolist() == [*range(40)]
    with pytest.raises(ConfigError, match=r"50 tokens are too few; at least 64"):
        read_batches([str(path)], Words(), 64, 100)

"""``mtnlg export`` and ``mtnlg import``: there and back through every format."""

from __future__ import annotations

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
from mtnlg.cli.main import main
from mtnlg.training.model_files import open_model_files

TEXT = "秋天的夜晚，星光闪烁。The stars are bright tonight."
FIELDS = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, position_embedding="rotary", normalization="rmsnorm",
    activation_function="swiglu", attention_bias=False, mlp_bias=False, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, vocab_size=300, min_frequency=1)


@pytest.fixture
def model(tokenizer, tmp_path):
    made = MegatronLmModel(MegatronModelConfig(vocab_size=300, **FIELDS), tokenizer)
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["hf", "gguf", "megatron"])
def test_there_and_back_is_the_same_model(model, tmp_path, kind, capsys):
    if kind == "gguf":
        pytest.importorskip("gguf", reason="needs the interop extra (gguf)")
    there = tmp_path / ("there.gguf" if kind == "gguf" else "there")
    full = [] if kind != "gguf" else ["--precision", "float32"]
    assert main(["export", str(model), "--format", kind, "--out", str(there), *full]) == 0
    assert main(["import", str(there), "--out", str(tmp_path / "back")]) == 0
    told = capsys.readouterr().out
    assert "parameters" in told and "next: mtnlg generate" in told
    before, after = (open_model_files(path).read() for path in (model, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = MegatronLmModel.from_pretrained(tmp_path / "back")
    assert again.tokenizer.encode(TEXT) == MegatronLmModel.from_pretrained(model).tokenizer.encode(TEXT)


def test_precision_and_size_of_files(model, tmp_path):
    out = tmp_path / "half"
    words = ["--precision", "bf16", "--max-shard-gb", "0.00002"]
    assert main(["export", str(model), "--format", "hf", "--out", str(out), *words]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert {tensor.dtype for tensor in open_model_files(out).read().values()} == {torch.bfloat16}
    assert main(["import", str(model), "--out", str(tmp_path / "fp16"), "--precision", "fp16"]) == 0
    assert next(iter(open_model_files(tmp_path / "fp16").read().values())).dtype == torch.float16


def test_a_model_of_no_family_becomes_a_checkpoint_of_ours(tokenizer, tmp_path, capsys):
    """A gate and LayerNorm: Megatron has it and none of the Hugging Face families that we know."""
    config = MegatronModelConfig(vocab_size=300, **FIELDS | dict(normalization="layernorm"))
    model = MegatronLmModel(config, tokenizer)
    from mtnlg.interop import write_megatron

    state = model.state_dict()
    write_megatron(tmp_path / "theirs", config, lambda names: ((name, state[name]) for name in names))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "mine"), *words]) == 0
    assert "a checkpoint of mtnlg" in capsys.readouterr().out
    mine = MegatronLmModel.from_pretrained(tmp_path / "mine")
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    assert mine.generate("秋天", max_new_tokens=3).startswith("秋天")


def test_what_is_wrong_is_said(model, tmp_path, capsys):
    def told(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "model is there already" in told("export", model, "--format", "hf", "--out", model)
    assert "choose one of float32, bf16, fp16" in told(
        "export", model, "--format", "hf", "--out", out, "--precision", "q8_0"
    )
    assert "it must be above 0" in told(
        "export", model, "--format", "hf", "--out", out, "--max-shard-gb", "0"
    )
    (tmp_path / "empty").mkdir()
    assert "neither a run" in told("import", tmp_path / "empty", "--out", out)
    assert "there is no such folder" in told("import", tmp_path / "nothing", "--out", out)
    Tokenizer.train([TEXT * 9], vocab_size=330, min_frequency=1).save_pretrained(tmp_path / "large")
    found = told("import", model, "--out", out, "--tokenizer", tmp_path / "large")
    assert "the model 300: they do not belong together" in found
    assert not out.exists()

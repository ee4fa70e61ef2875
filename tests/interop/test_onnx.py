"""ONNX: the graph computes in ONNX Runtime what the model does, for texts of any number and length."""

from __future__ import annotations

import sys

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
from mtnlg.cli.main import main
from mtnlg.config import CheckpointError, ConfigError
from mtnlg.interop import write_onnx
from mtnlg.interop.onnx_file import data_file
from mtnlg.model import MegatronLmDecoder

FIELDS = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=48
)
LLAMA = dict(
    position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu", mlp_bias=False,
    attention_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
)  # fmt: skip
CASES = {  # each way to compute positions, norms and scores is in one of them
    "mistral": LLAMA
    | dict(
        sliding_window=7,
        qk_normalization=True,
        parallel_residual=True,
        rotary_scaling=dict(rope_type="dynamic", factor=2.0),
    ),
    "gemma2": LLAMA
    | dict(
        normalization="rmsnorm_1p",
        norm_placement="around",
        embedding_scale=3.0,
        logit_softcap=2.0,
        attention_softcap=1.5,
        attention_scalar=5.0,
        sliding_window=6,
        rotary_scaling=LONGROPE,
    ),
}
REFUSED = {
    "encoder-decoders cannot be written": (
        dict(architecture="encoder_decoder", position_embedding="relative"),
        torch.float32,
    ),
    "mixtures of experts cannot be written": (LLAMA | dict(num_experts=4), torch.float32),
    "precision bf16 cannot be written": (dict(), torch.bfloat16),
}


def make_model(**fields):
    model = MegatronLmModel(MegatronModelConfig(**FIELDS | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # also what would begin as zero or one
    return model.eval()


def stream_of(model):
    state = model.state_dict()
    return lambda names: ((name, state[name]) for name in names)


def assert_same(path, model, bound=1e-5):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 9), (3, 40), (1, 1)):
        ids = torch.randint(67, shape)
        with torch.no_grad():
            expected = model(ids).logits
        found = torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0]).float()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= bound * expected.abs().max()
    return session


@pytest.fixture(autouse=True)
def packages():
    pytest.importorskip("onnxscript", reason="needs the onnx extra")


@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_the_model(family, tmp_path):
    model = make_model(**CASES[family])
    assert_same(write_onnx(tmp_path / "model.onnx", model.config, stream_of(model)), model)


def test_large_weights_lie_beside_the_file(tmp_path):
    model, path = make_model(position_embedding="alibi", embedding_norm=True), tmp_path / "model.onnx"
    write_onnx(path, model.config, stream_of(model), max_embedded_bytes=1000)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert sorted(tmp_path.iterdir()) == [path, data_file(path)]
    assert data_file(path).stat().st_size > weights - 9000  # vectors may stay in the file
    assert_same(path, model)
    (tmp_path / "moved").mkdir()
    for old in (path, data_file(path)):
        old.rename(tmp_path / "moved" / old.name)
    assert_same(tmp_path / "moved" / path.name, model)


def test_the_verb_writes_the_tokenizer_too(tmp_path, capfd):
    text = "秋天的夜晚，星光闪烁。"
    model = make_model(vocab_size=300)
    model.tokenizer = Tokenizer.train([text] * 3, vocab_size=300, min_frequency=1)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "out" / "half.onnx"
    data_file(path).parent.mkdir()
    data_file(path).write_text("of an earlier export")
    words = ["--format", "onnx", "--precision", "fp16", "--out", str(path)]
    assert main(["export", str(tmp_path / "model"), *words]) == 0
    told = capfd.readouterr()
    assert "next: onnxruntime.InferenceSession" in told.out
    assert "torch.onnx" not in told.out + told.err and "arning" not in told.err
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    held = assert_same(path, model, bound=1e-2).get_modelmeta().custom_metadata_map
    from tokenizers import Tokenizer as Plain

    ids = Plain.from_str(held["tokenizer.json"]).encode(text, add_special_tokens=False).ids
    assert ids == model.tokenizer.encode(text)
    assert '"hidden_size": 32' in held["mtnlg.config"] and "tokenizer_config.json" in held


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_written_is_refused(reason, tmp_path):
    fields, dtype = REFUSED[reason]
    with pytest.raises(ConfigError, match=reason):
        write_onnx(
            tmp_path / "x.onnx", MegatronModelConfig(**FIELDS | fields), lambda names: (), dtype=dtype
        )
    assert not list(tmp_path.iterdir())


def test_weights_or_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    config = MegatronModelConfig(**FIELDS)
    left_out = "head.norm.weight"
    whole = stream_of(MegatronLmDecoder(config))
    with pytest.raises(CheckpointError, match=f"weights are missing: {left_out}"):
        write_onnx(tmp_path / "x.onnx", config, lambda names: whole(set(names) - {left_out}))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install .mtnlg\[onnx\]"):
        write_onnx(tmp_path / "x.onnx", config, whole)

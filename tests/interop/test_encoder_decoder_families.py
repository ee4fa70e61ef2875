"""T5, mT5 and UMT5 both ways, against transformers itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtnlg.config import CheckpointError, ConfigError
from mtnlg.interop import read_config, read_weights, write_hugging_face
from mtnlg.model import MegatronEncoderDecoder

SHAPE: dict[str, Any] = dict(
    vocab_size=67, d_model=22, d_kv=7, d_ff=37, num_layers=2, num_decoder_layers=3, num_heads=3,
    relative_attention_num_buckets=10, relative_attention_max_distance=17, dropout_rate=0.1,
    decoder_start_token_id=0,
)  # fmt: skip
# name: (class, fields, whether the files have a head of their own)
THEIRS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "t5-1.0": ("T5", {}, False),
    "t5-1.1": ("T5", dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu"), True),
    "ul2": ("T5", dict(tie_word_embeddings=False, feed_forward_proj="gated-silu"), True),
    "mt5": ("MT5", {}, True),
    "mt5-tied": ("MT5", dict(num_layers=1, num_decoder_layers=1, num_heads=1, d_kv=5), False),
    "umt5": ("UMT5", dict(num_decoder_layers=2), True),
}
GENERATOR = torch.Generator().manual_seed(5)
SOURCE = torch.randint(2, 67, (3, 29), generator=GENERATOR)
LABELS = torch.randint(2, 67, (3, 13), generator=GENERATOR)
MASK = torch.ones_like(SOURCE)
MASK[1, 20:] = 0
MASK[2, :5] = 0
LABELS[0, 9:] = -100


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs the interop extra (transformers)")


def make_theirs(transformers: Any, name: str, folder: Any) -> Any:
    """A model of theirs with random weights, norms too, as it comes back out of its folder."""
    kind, fields, own_head = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **fields})
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    torch.manual_seed(0)
    theirs = model_class(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            parameter *= 0.7
    theirs.save_pretrained(folder)
    if own_head:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = 0.3 * torch.randn(config.vocab_size, config.d_model)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model_class.from_pretrained(folder).eval()


def load(folder: Any) -> MegatronEncoderDecoder:
    config = read_config(folder)
    model = MegatronEncoderDecoder(config)
    model.load_state_dict(read_weights(folder, config))
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module", params=THEIRS)
def pair(request, transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_theirs(transformers, request.param, folder)
    return request.param, theirs, load(folder), folder


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_logits_loss_and_gradients_are_transformers(pair):
    """Padding on both sides, ignored labels, sizes that nothing divides: float32 to 1e-5."""
    name, theirs, ours, _ = pair
    expected = theirs(SOURCE, attention_mask=MASK, labels=LABELS)
    found = ours(SOURCE, attention_mask=MASK, labels=LABELS)
    logits = ours(SOURCE, ours.shift_right(LABELS), attention_mask=MASK).logits
    assert relative(logits, expected.logits) < 1e-5
    num_valid = (LABELS != -100).sum()
    assert relative(found.loss / num_valid, expected.loss) < 1e-5
    theirs.zero_grad()
    ours.zero_grad()
    expected.loss.backward()
    (found.loss / num_valid).backward()
    assert ours.config.tie_word_embeddings is not THEIRS[name][2]
    assert (theirs.lm_head.weight is theirs.shared.weight) is ours.config.tie_word_embeddings
    compare_gradients(theirs, ours)


def compare_gradients(theirs: Any, ours: MegatronEncoderDecoder) -> None:
    from mtnlg.interop.encoder_decoder_families import encoder_decoder_names

    expected = {name: item.grad for name, item in theirs.named_parameters()}
    pairs = [
        (ours.get_parameter(mine).grad, expected[name])
        for name, mine in encoder_decoder_names(ours.config).items()
    ]
    assert len(pairs) == len(expected) == len(list(ours.parameters()))
    largest = max(float(gradient.abs().max()) for _, gradient in pairs)
    assert max(float((a - b).abs().max()) for a, b in pairs) / largest < 1e-5


def test_bf16_is_as_near_to_float32_as_transformers_own(pair):
    """Both round differently, so the bound is on the distance of each from float32."""
    _, theirs, _ours, folder = pair
    with torch.no_grad():
        exact = theirs(SOURCE, attention_mask=MASK, labels=LABELS).logits
        rounded = type(theirs).from_pretrained(folder, dtype=torch.bfloat16).eval()
        expected = rounded(SOURCE, attention_mask=MASK, labels=LABELS).logits.float()
        here = load(folder).to(torch.bfloat16)
        found = here(SOURCE, here.shift_right(LABELS), attention_mask=MASK).logits.float()
    distance = (expected - exact).norm() / exact.norm()
    assert (found - exact).norm() / exact.norm() < max(1.5 * distance, 0.01)
    assert (found - expected).norm() / exact.norm() < 0.05


def test_what_we_write_is_what_transformers_and_we_read(pair, transformers, tmp_path):
    _, theirs, ours, _folder = pair
    write_hugging_face(ours, tmp_path, max_shard_bytes=20_000)
    again = load(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(SOURCE, attention_mask=MASK, labels=LABELS).logits
        assert torch.equal(loaded(SOURCE, attention_mask=MASK, labels=LABELS).logits, expected)
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(loaded.generation_config, name) for name in names] == [0, 1, 0]


def test_fields_that_no_file_of_theirs_has_come_back(transformers, tmp_path):
    theirs = make_theirs(transformers, "t5-1.0", tmp_path)
    ours = load(tmp_path)
    ours.config.max_position_embeddings = 100
    ours.config.attention_dropout = 0.2
    write_hugging_face(ours, tmp_path / "out")
    assert read_config(tmp_path / "out") == ours.config
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout_rate": 0.4}))
    assert read_config(tmp_path / "out").hidden_dropout == 0.4  # who edits their file means it
    assert theirs.config.num_layers == ours.config.num_hidden_layers


def test_copies_of_the_embedding_and_a_matrix_nobody_uses_may_lie_in_old_files(transformers, tmp_path):
    make_theirs(transformers, "t5-1.0", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["shared.weight"]
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = embedding.clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(10, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    assert ours.config.tie_word_embeddings
    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).embedding.tokens.weight, embedding)


def test_tensors_that_are_missing_or_of_nobody_are_named(transformers, tmp_path):
    make_theirs(transformers, "mt5", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    tensors["decoder.block.7.layer.0.layer_norm.weight"] = torch.ones(22)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "decoder.block.1.layer.1.EncDecAttention.k.weight is missing" in str(caught.value)
    assert "decoder.block.7.layer.0.layer_norm.weight belongs to no parameter" in str(caught.value)


def test_what_their_files_cannot_say_is_refused(transformers, tmp_path):
    make_theirs(transformers, "t5-1.0", tmp_path)
    config = read_config(tmp_path)
    for fields, said in [
        ({"activation_function": "geglu"}, "activation_function is 'geglu'"),
        ({"mlp_bias": True, "normalization": "layernorm"}, "mlp_bias is True"),
        ({"relative_attention_per_layer": True, "scale_output": False}, "then scale_output must be"),
    ]:
        model = MegatronEncoderDecoder(type(config)(**{**config.to_dict(), **fields}))
        with pytest.raises(ConfigError, match=said):
            write_hugging_face(model, tmp_path / "out")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feed_forward_proj": "gated-tanh"}))
    with pytest.raises(CheckpointError, match="feed_forward_proj 'gated-tanh' is unknown"):
        read_config(tmp_path)

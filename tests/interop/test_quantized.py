"""Quantized folders: out and in again without loss, and read by others."""

from __future__ import annotations

import json

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config import CheckpointError
from mtnlg.interop.words import pack_words, unpack_words
from mtnlg.quantization import quantized_linears
from mtnlg.training.model_files import open_model_files

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
LLAMA = dict(
    position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
    attention_bias=False, mlp_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
)  # fmt: skip
KINDS = [
    dict(head="float"),
    dict(activations="int8", head="float"),
    dict(group_size=16, symmetric=False, head="float"),
    dict(weights="int4", group_size=16, head="float"),
    dict(weights="int4", group_size=16, symmetric=False, head="float"),
    dict(weights="float8", head="float"),
]


def make(quantize, **family):
    config = MegatronModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, init_method_std=0.15, quantize=True, quantize_config=quantize, **family,
    )  # fmt: skip
    return MegatronLmModel(config).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_codes_from_the_lowest_bits(bits):
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, 13), dtype=torch.int8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-13 * bits // 32))
    assert torch.equal(unpack_words(words, bits, 13), codes)
    unsigned = int(words[0, 0]) & 0xFFFFFFFF
    assert unsigned >> bits & (2**bits - 1) == int(codes[0, 1]) + half


@pytest.mark.parametrize("family", [LLAMA, {}], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_round_trip_loses_nothing(tmp_path, family, kind):
    model = make(kind, **family)
    model.save_pretrained(tmp_path)
    found = MegatronLmModel.from_pretrained(tmp_path)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    own, wanted = (next(iter(quantized_linears(m).values())).config for m in (found, model))
    assert own == wanted or own.group_size == wanted.inputs_per_scale
    method = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == ("compressed-tensors" if family else "mtnlg")


def test_a_quantized_head_stays_so_under_our_own_names(tmp_path):
    model = make(dict(weights="int4", group_size=16))
    model.save_pretrained(tmp_path)
    found = MegatronLmModel.from_pretrained(tmp_path)
    assert found.head.output.config.weights == "int8"
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored < 0.5 * 4 * model.num_parameters


@pytest.mark.parametrize("family", [LLAMA, {}], ids=["llama", "gpt2"])
def test_who_wants_floats_gets_what_the_codes_stand_for(tmp_path, family):
    model = make(dict(weights="int4", group_size=16, symmetric=False), **family)
    model.save_pretrained(tmp_path)
    name = "layers.1.mlp.down.weight"
    found = dict(open_model_files(tmp_path).stream([name]))
    assert torch.equal(found[name], model.layers["1"].mlp.down.dequantize())


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=str)
def test_compressed_tensors_reads_the_same_numbers(tmp_path, kind):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    assert compressors
    model = make(kind, **LLAMA)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    error = (theirs(IDS).logits - model(IDS).logits).norm() / model(IDS).logits.norm()
    # Their scale of activations is a 127.5th of the largest, ours a 127th: other roundings.
    assert float(error.detach()) < (0.06 if "activations" in kind else 1e-5)


def test_compressed_tensors_packs_zero_points_in_the_same_way():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (8, 16), dtype=torch.int8)
    assert torch.equal(helpers.pack_to_int32(codes, 4, packed_dim=1), pack_words(codes, 4))
    along = pack_words(codes.t().contiguous(), 4).t()
    assert torch.equal(helpers.pack_to_int32(codes, 4, packed_dim=0), along)


def test_other_methods_are_named(tmp_path):
    make(KINDS[3], **LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["quantization_config"]["quant_method"] = "bitsandbytes"
    path.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"quantized by 'bitsandbytes' are not read, only compressed"):
        MegatronLmModel.from_pretrained(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    make(KINDS[3], **LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight_packed"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing.*layers.1.mlp.up_proj.weight_packed"):
        MegatronLmModel.from_pretrained(tmp_path)

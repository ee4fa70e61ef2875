"""Folders that others have quantized: GPTQ, AWQ, float8."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.packed_folders import packed_folder
from tests.interop.test_hugging_face import LLAMA

from mtnlg import MegatronLmModel
from mtnlg.config import CheckpointError
from mtnlg.quantization import quantized_linears
from mtnlg.training.import_model import import_model
from mtnlg.training.model_files import open_model_files

IDS = torch.randint(0, 71, (2, 9), generator=torch.Generator().manual_seed(1))
UNTIED = LLAMA | dict(tie_word_embeddings=False, intermediate_size=64)
GPTQ = dict(quant_method="gptq", bits=4, group_size=16, sym=True, desc_act=False)
V2 = GPTQ | dict(sym=False, checkpoint_format="gptq_v2")
AWQ = dict(quant_method="awq", bits=4, group_size=16, zero_point=True, version="gemm")
FP8 = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[16, 16])
MOE = UNTIED | dict(num_experts=4, num_experts_per_token=2, moe_intermediate_size=24,
    router_load_balancing="none", normalize_router_weights=True)  # fmt: skip
CASES = {
    "gptq-4": (GPTQ, UNTIED),
    "gptq-4-zeros": (GPTQ | dict(sym=False), UNTIED),
    "gptq-4-order": (GPTQ | dict(sym=False, desc_act=True), UNTIED),
    "gptq-8-order": (GPTQ | dict(bits=8, desc_act=True), UNTIED),
    "gptq-8-zeros-rows": (GPTQ | dict(bits=8, sym=False, group_size=-1), UNTIED),
    "gptq-v2-short-group": (V2, UNTIED | dict(intermediate_size=56)),
    "gptq-gpt2": (GPTQ, dict(activation_function="gelu_tanh", intermediate_size=64)),
    "gptq-experts": (GPTQ, MOE),
    "awq": (AWQ, UNTIED),
    "awq-rows-tied": (AWQ | dict(group_size=-1), LLAMA | dict(intermediate_size=64)),
    "awq-partly": (AWQ, UNTIED),
    "fp8-blocks": (FP8, UNTIED | dict(intermediate_size=56)),
    "fp8-tensor": (FP8 | dict(weight_block_size=None), UNTIED),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_that_the_files_stand_for(tmp_path, case):
    said, fields = CASES[case]
    left = {"gptq-experts": ("gate.weight",), "awq-partly": ("k_proj", "layers.1.mlp")}.get(case, ())
    plain, _ = packed_folder(tmp_path, said, left, **fields)
    expected = MegatronLmModel.from_pretrained(plain)
    found = MegatronLmModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
    for name, linear in quantized_linears(found).items():
        assert torch.equal(linear.dequantize(), expected.get_submodule(name).weight), name
    counts = {"gptq-experts": 12, "gptq-gpt2": 18, "awq-partly": 15}
    assert len(quantized_linears(found)) == counts.get(case, 21)
    asked = dict(max_new_tokens=4, temperature=0.0)
    if case in ("gptq-8-order", "awq-partly"):
        ids = IDS[0].tolist()
        assert found.generate(ids, **asked) == expected.generate(ids, **asked)
    floats = dict(open_model_files(tmp_path).stream(list(expected.state_dict())))
    for name, tensor in floats.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    out = tmp_path / "again"
    found.save_pretrained(out)
    with torch.no_grad():
        assert torch.equal(MegatronLmModel.from_pretrained(out)(IDS).logits, found(IDS).logits)


def changed(folder, **tensors):
    path = folder / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


def test_import_makes_a_folder_in_floating_point(tmp_path):
    plain, _ = packed_folder(tmp_path, AWQ, **UNTIED)
    kind = import_model(open_model_files(tmp_path), tmp_path / "out", None)
    assert kind == "a Hugging Face folder (llama)"
    found, expected = (load_file(one / "model.safetensors") for one in (tmp_path / "out", plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    opened = [MegatronLmModel.from_pretrained(one) for one in (tmp_path / "out", plain)]
    assert opened[0].config == opened[1].config


def test_gptqs_first_programs_say_it_in_a_file_of_its_own(tmp_path):
    _, matrices = packed_folder(tmp_path, GPTQ, **UNTIED)
    config = json.loads((tmp_path / "config.json").read_text())
    said = config.pop("quantization_config")
    del said["quant_method"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-16g.safetensors")
    found = MegatronLmModel.from_pretrained(tmp_path).layers["2"].mlp.down
    assert torch.equal(found.dequantize().double(), matrices["model.layers.2.mlp.down_proj.weight"])


Q, BIAS = "model.layers.0.self_attn.q_proj.", torch.zeros(32)
WRONG = {
    "is missing": ({}, {f"{Q}qweight": None}, r"tensors are missing: .*0\.self_attn\.q_proj\.weight"),
    "scales are missing": ({}, {f"{Q}scales": None}, r"tensors are missing: .*q_proj\.scales"),
    "is too much": ({}, {f"{Q}bias": BIAS + 1}, r"belong to no parameter: .*q_proj\.bias"),
    "has zero points": (dict(sym=True), {}, r"q_proj\.qzeros: zero points, and config.json says sym: true"),
    "bits": (dict(bits=3), {}, "GPTQ with bits 3 in the format 'gptq' is not read"),
    "form": (dict(checkpoint_format="marlin"), {}, "in the format 'marlin' is not read"),
    "groups": ({}, {f"{Q}g_idx": torch.zeros(32, dtype=torch.int32)}, "groups do not have 16 inputs each"),
    "method": (
        dict(quant_method="bitsandbytes"),
        {},
        r"'bitsandbytes' are not read, only compressed-tensors",
    ),
    "awq": (
        dict(quant_method="awq", version="gemv"),
        {},
        "AWQ with 4 bits in the version 'gemv' is not read",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_named(tmp_path, what):
    said, tensors, message = WRONG[what]
    packed_folder(tmp_path, GPTQ | dict(sym=False), **UNTIED)
    changed(tmp_path, **tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= said
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        MegatronLmModel.from_pretrained(tmp_path)


def test_biases_that_are_all_zero_may_be_there(tmp_path):
    """GPTQ's first programs gave every matrix one."""
    packed_folder(tmp_path, GPTQ, **UNTIED)
    ids = torch.arange(9)[None]
    without = MegatronLmModel.from_pretrained(tmp_path)(ids).logits
    changed(tmp_path, **{f"{Q}bias": BIAS})
    assert torch.equal(MegatronLmModel.from_pretrained(tmp_path)(ids).logits, without)

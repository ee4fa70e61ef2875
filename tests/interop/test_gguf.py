"""GGUF files, read by the format's own library and by us; tests/interop/test_llama_cpp.py runs them."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
import torch
from tests.interop.gguf_models import FAMILIES, IDS, LLAMA, SIZES, TEXTS, continued, model_of, write
from tests.interop.gguf_tokenizers import TEXTS as PIECES
from tests.interop.gguf_tokenizers import likely_pieces, merging_pieces

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop import write_gguf
from mtnlg.interop.gguf_header import read_header
from mtnlg.interop.gguf_reader import Quantized
from mtnlg.interop.k_quants import K_QUANTS, quantize_k
from mtnlg.interop.lazy_tensor import lazy, read
from mtnlg.tokens import Tokenizer
from mtnlg.training.model_files import open_model_files

gguf = pytest.importorskip("gguf", reason="needs the interop extra (gguf)")
MAY_DIFFER = {  # what files do not say, or say where we leave it to be derived
    *("init_method_std", "exported_as", "attention_output_bias", "num_key_value_heads", "attention_scalar"),
    *("num_decoder_layers", "scale_output", "intermediate_size"),
}
MORE_DIFFERS = {  # what the family's keys have no word for
    "llama-3.1": {"rotary_scaling"},
    "llama-yarn": {"rotary_scaling"},
    "llama-longrope": {"rotary_scaling"},
    "phi3-longrope": {"rotary_scaling"},
    "qwen2-yarn": {"rotary_scaling"},
    "mistral-window": {"sliding_window", "max_position_embeddings"},
    "gpt_neox-serial": {"tie_word_embeddings"},
    "qwen2_moe": {"tie_word_embeddings"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=330, min_frequency=1)


def changed(path, *pairs):
    """The same file with some bytes for others."""
    content = path.read_bytes()
    for old, new in pairs:
        assert old in content and len(old) == len(new)
        content = content.replace(old, new)
    found = path.with_name("changed.gguf")
    found.write_bytes(content)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_same_model(tmp_path, name):
    """Bit for bit, in every field; without what only we write, like others' files, it computes the same."""
    model = model_of(**FAMILIES[name])
    path = write(tmp_path / "m.gguf", model, None, "f32")
    files = open_model_files(path)
    state = dict(model.state_dict())
    assert files.config == model.config
    found = files.read()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    header = gguf.GGUFReader(path)
    table = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[_architecture(header)]}
    names = {re.sub(r"\.\d+\.", ".{bid}.", tensor.name).rpartition(".")[0] for tensor in header.tensors}
    assert names - {"rope_factors_long", "rope_factors_short"} <= table, "the format's own tables"

    pairs = [(b"mtnlg.config", b"other.config")]
    if any(field.name == "mtnlg.exact" for field in header.fields.values()):
        pairs.append((b"mtnlg.exact", b"other.exact"))
    others = open_model_files(changed(path, *pairs))
    differing = {
        field for field, value in model.config.to_dict().items() if getattr(others.config, field) != value
    }
    assert differing <= MAY_DIFFER | MORE_DIFFERS.get(name, set())
    again = type(model)(others.config).eval()
    again.load_state_dict(others.read())
    ours, theirs = (continued(one, IDS[0], 1)[0] for one in (model, again))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def _architecture(header):
    name = header.fields["general.architecture"].contents()
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def test_our_own_words_are_not_believed_where_the_file_says_otherwise(tmp_path):
    model = model_of(**FAMILIES["gemma2"])
    path = write(tmp_path / "m.gguf", model, None, "f32")
    key = b"gemma2.attn_logit_softcapping" + struct.pack("<If", 6, 50.0)
    files = open_model_files(changed(path, (key, key[:-4] + struct.pack("<f", 25.0))))
    assert files.config.attention_softcap == 25.0
    norm = model.state_dict()["head.norm.weight"]
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output_norm.weight")
    start = int(stored.data_offset)
    content = bytearray(path.read_bytes())
    content[start : start + 4] = struct.pack("<f", 3.0)
    path.write_bytes(content)
    found = open_model_files(path).read()["head.norm.weight"]
    assert found[0] == 2.0 and torch.allclose(found[1:], norm[1:], atol=1e-6)


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_0", "q4_k_m", "q2_k"])
def test_few_bits_are_numbers_again(tmp_path, precision):
    """As the file's own library makes numbers of them, also of some rows only."""
    model = model_of(**LLAMA | dict(hidden_size=256, intermediate_size=512, exported_as="phi3"))
    path = write(tmp_path / "m.gguf", model, None, precision)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    files = open_model_files(path)
    weights = files.read()
    whole = stored["blk.1.attn_qkv.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(whole.data, whole.tensor_type)).float()
    joined = [weights[f"layers.1.attention.{part}.weight"].float() for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(joined), expected)
    name = "layers.1.mlp.up.weight"
    ((_, part),) = files.stream([name], lambda _, view: view[7:9, 3:200])
    assert torch.equal(part, weights[name][7:9, 3:200])


def test_every_format_that_the_library_knows_is_read(tmp_path):
    """Some rows of random codes, beside what the library makes of all of them."""
    kinds = [kind for kind in gguf.quants._type_traits if gguf.GGML_QUANT_SIZES[kind][0] > 1]
    assert len(kinds) > 15
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "none")
    random = np.random.default_rng(0)
    codes = {}
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        codes[kind.name] = random.integers(0, 64, (6, 512 // block * size), dtype=np.uint8)
        writer.add_tensor(kind.name, codes[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, stored in read_header(tmp_path / "m.gguf").tensors.items():
        expected = torch.from_numpy(gguf.quants.dequantize(codes[name], stored.kind)).float()
        found = read(lazy(Quantized(stored), stored.shape, torch.float32)[2:5, 7:400:3])
        assert torch.equal(found, expected[2:5, 7:400:3]), name


@pytest.mark.parametrize("precision", ["f16", "bf16", "q4_k_m"])
@pytest.mark.parametrize("name", ["gpt2", "glm4_moe", "gemma2", "t5"])
def test_a_model_computes_in_one_type(tmp_path, name, precision):
    """Whatever its file has vectors and routers in; 80 columns of t5's are no whole number of blocks."""
    model = model_of(**FAMILIES[name])
    files = open_model_files(write(tmp_path / "m.gguf", model, None, precision))
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    weights = files.read()
    found = {parameter.dtype for key, parameter in weights.items() if not key.endswith("selection_bias")}
    assert found == {dtype}
    again = type(model)(files.config).to(dtype).eval()
    again.load_state_dict(weights)
    ours, theirs = (continued(one, IDS[0], 1)[0].float() for one in (model, again))
    assert (ours - theirs).abs().max() <= (0.15 if dtype != torch.float32 else 0.7) * ours.abs().max()


def test_k_formats_lose_little():
    """Of what a number is: measured once beside ggml's own quantizer (tests/interop/test_llama_cpp.py)."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(40, 512, generator=generator)
    bounds = {"Q2_K": 0.28, "Q3_K": 0.148, "Q4_K": 0.073, "Q5_K": 0.0368, "Q6_K": 0.0179}
    assert bounds.keys() == K_QUANTS.keys()
    for scale in (1e-3, 1.0, 300.0):
        for name, bound in bounds.items():
            coded = quantize_k(numbers * scale, name)
            back = gguf.quants.dequantize(coded.numpy(), gguf.GGMLQuantizationType[name])
            error = (torch.from_numpy(back) / scale - numbers).square().mean().sqrt()
            assert 0.5 * bound < error < bound, (name, scale)
    flat = torch.cat((torch.zeros(2, 256), torch.full((2, 256), 0.25), torch.full((2, 256), -3.0)))
    flat[1, 17] = 1e-30
    for name in K_QUANTS:
        coded = quantize_k(flat, name).numpy()
        back = torch.from_numpy(gguf.quants.dequantize(coded, gguf.GGMLQuantizationType[name]))
        assert (back - flat).abs().max() <= 0.02, name


def test_which_tensors_have_more_bits(tmp_path):
    fields = LLAMA | dict(hidden_size=256, num_hidden_layers=4, tie_word_embeddings=False)
    model = model_of(**fields | dict(intermediate_size=320))
    kinds = {}
    for precision in ("q4_0", "Q4_K_M"):
        path = write(tmp_path / f"{precision}.gguf", model, None, precision)
        kinds[precision] = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    simple, mixed = kinds.values()
    assert simple["token_embd.weight"] == simple["output.weight"] == "Q8_0"
    assert simple["blk.0.attn_q.weight"] == simple["blk.1.ffn_up.weight"] == "Q4_0"
    assert simple["blk.0.attn_norm.weight"] == simple["output_norm.weight"] == "F32"
    assert mixed["output.weight"] == mixed["blk.2.attn_v.weight"] == "Q6_K"
    assert mixed["token_embd.weight"] == mixed["blk.0.attn_v.weight"] == "Q4_K"
    assert mixed["blk.2.ffn_down.weight"] == "Q8_0", "320 columns are no whole number of blocks of 256"
    assert mixed["blk.0.ffn_down.weight"] == "Q5_0"
    narrow = write(tmp_path / "n.gguf", model_of(**LLAMA | dict(intermediate_size=80)), None, "q4_k_m")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(narrow).tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16", "80 columns are no whole number of blocks of 32"


def test_the_tokenizer_goes_along(tmp_path, tokenizer):
    told = Tokenizer(tokenizer.definition, {"chat_template": "{{ messages[0].content }}"})
    path = write(tmp_path / "m.gguf", model_of(**LLAMA), told, "f16")
    found = open_model_files(path).tokenizer
    assert found.chat_template == told.chat_template and found.special_tokens == told.special_tokens
    for text in TEXTS:
        assert found.encode(text) == told.encode(text) and found.decode(told.encode(text)) == text
    fields = gguf.GGUFReader(path).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == 340 and len(set(tokens)) == 340
    assert types[:7] == [int(gguf.TokenType.CONTROL)] * 6 + [int(gguf.TokenType.NORMAL)]
    assert types[-1] == int(gguf.TokenType.UNUSED), "ids without a token"


def test_pieces_come_back(tmp_path):
    """SentencePiece's two kinds: as pieces that merge by their scores, and as T5's likeliest ones."""
    merging, likely = merging_pieces(), likely_pieces()
    for fields, told in ((LLAMA, merging), (FAMILIES["t5"], likely)):
        path = write(tmp_path / "m.gguf", model_of(**fields), told, "f16")
        found = open_model_files(path).tokenizer
        assert type(found) is type(told)
        for text in (*PIECES, "猫 <extra_id_0> the"):
            ids = told.encode(text)
            assert found.encode(text) == ids and found.decode(ids) == told.decode(ids)
        assert found.end_of_text_id == told.end_of_text_id and found.padding_id == told.padding_id
        assert found.special_tokens == told.special_tokens


def split_in_two(path):
    """The file as llama.cpp's gguf-split writes it: all keys in the first part, tensors in both."""
    header = gguf.GGUFReader(path)
    half = len(header.tensors) // 2
    for number, tensors in enumerate((header.tensors[:half], header.tensors[half:])):
        part = path.with_name(f"part-{number + 1:05d}-of-00002.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        for name, field in header.fields.items():
            if number == 0 and "." in name and name != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(header.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield part


def test_a_file_in_parts_is_one_model(tmp_path, tokenizer):
    model = model_of(**LLAMA)
    first, second = split_in_two(write(tmp_path / "m.gguf", model, tokenizer, "f32"))
    state = model.state_dict()
    for part in (first, second):
        files = open_model_files(part)
        found = files.read()
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert files.tokenizer.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(
        CheckpointError, match="one of 2 parts of a model, but not called NAME-00001-of-00002"
    ):
        open_model_files(alone)
    with pytest.raises(CheckpointError, match=r"parts of the model are missing: part-00001-of-00002\.gguf"):
        open_model_files(second)


def test_damaged_files_and_other_models_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "m.gguf", model_of(**LLAMA), tokenizer, "f32")
    content = path.read_bytes()
    cases = [
        (
            content[: len(content) // 2],
            r"tensor \S+ should end at byte \d+, but the file has \d+: it is cut",
        ),
        (content[:900], "the header is damaged or cut short at byte"),
        (b"", "damaged or not a GGUF file"),
        (b"PK\x03\x04" + content[4:], r"it begins with b'PK\\x03\\x04', not with b'GGUF'"),
        (content[:4] + struct.pack("<I", 1) + content[8:], "its version is 1: only little-endian"),
        (content[:4] + struct.pack(">I", 3) + content[8:], "its bytes are in big-endian order"),
        (content[:16] + struct.pack("<Q", 2**60) + content[24:], "the header is damaged"),
        (content.replace(b"llama", b"gguul"), r"general\.architecture is 'gguul': only bloom, gemma"),
        (
            content.replace(b"blk.0.attn_q.", b"blk.0.attn_x."),
            "attn_q.weight is missing; tensor blk.0.attn_x",
        ),
    ]
    for wrong, said in cases:
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=said):
            open_model_files(path)


def test_a_tokenizer_of_another_kind_is_told(tmp_path, tokenizer):
    path = write(tmp_path / "m.gguf", model_of(**LLAMA), tokenizer, "f32")
    with pytest.warns(UserWarning, match=r"its tokenizer \(gpt2, kimi-x2\) is of no kind that can be read"):
        assert open_model_files(changed(path, (b"kimi-k2", b"kimi-x2"))).tokenizer is None


REFUSED = {
    r"'geglu'.*swiglu only": LLAMA | dict(activation_function="geglu"),
    r"rotary_scaling is 'dynamic' in a llama: it must be linear": LLAMA
    | dict(rotary_scaling=dict(rope_type="dynamic", factor=2.0)),
    "rotary_scaling has beta_fast 8": LLAMA
    | dict(
        rotary_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64, beta_fast=8)
    ),
    "rotary_scaling is 'llama3' in a qwen3": FAMILIES["llama-3.1"] | dict(qk_normalization=True),
    "models of the family opt cannot be written": dict(activation_function="relu", position_offset=2),
    "normalize_router_weights is False: it must be True": FAMILIES["qwen3_moe"]
    | dict(normalize_router_weights=False),
    "head_dim is 24: it must be hidden_size / num": FAMILIES["qwen2"] | dict(head_dim=24),
    "logit_softcap is None: llama.cpp always has it": FAMILIES["gemma2"] | dict(logit_softcap=None),
    "attention_scalar is 99": FAMILIES["gemma2"] | dict(attention_scalar=99.0),
    "relative_attention_max_distance is 64": FAMILIES["t5"] | dict(relative_attention_max_distance=64),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, said):
    config = MegatronModelConfig(**{**SIZES, **REFUSED[said]})
    with pytest.raises(ConfigError, match=said):
        write_gguf(tmp_path / "m.gguf", config, lambda names: [])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path, tokenizer):
    path = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="choose one of f32, f16"):
        write(path, model_of(**LLAMA), tokenizer, "q3")
    with pytest.raises(ConfigError, match="tokens and the model 71"):
        write(path, model_of(**LLAMA | dict(vocab_size=71)), tokenizer)
    definition = json.loads(tokenizer.definition)
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x+"
    with pytest.raises(ConfigError, match="no name for how this tokenizer cuts text"):
        write(path, model_of(**LLAMA), Tokenizer(json.dumps(definition)))
    broken = model_of(**LLAMA)
    broken.layers["1"].mlp.up.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape("layers.1.mlp.up.weight: the weights hold NaN")):
        write(path, broken, tokenizer)
    assert list(tmp_path.iterdir()) == []

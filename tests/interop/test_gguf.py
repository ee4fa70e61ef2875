"""GGUF files, read by the format's own library and run by llama.cpp."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tests.interop.llama import ask, needs_llama_cpp
from tests.interop.test_hugging_face import LLAMA, random_model

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop import write_gguf
from mtnlg.interop.gguf_file import PRECISIONS
from mtnlg.tokens import Tokenizer
from mtnlg.training.model_files import open_model_files

gguf = pytest.importorskip("gguf", reason="needs the interop extra (gguf)")
TEXTS = [
    "秋天的夜晚，星光闪烁。我们在山上看月亮，听风吹过松林。",
    'The value of x is 12345, isn\'t it? He said: "no".',
    "  def f(self):\n\treturn self.value_1 + 2\n\n",
    "Größe, naïve, Привет мир! 你好，world 2024年 🙂🎉",
]
FAMILIES = {
    "gpt2": dict(activation_function="gelu_tanh"),
    "gpt2-untied": dict(activation_function="gelu_tanh", tie_word_embeddings=False),
    "llama": dict(**LLAMA, tie_word_embeddings=False),
    "llama-biases": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama-head-dim": LLAMA | dict(head_dim=24),
    "llama-3.1": LLAMA
    | dict(
        rotary_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        head_dim=24,
    ),
    "llama-linear": LLAMA | dict(rotary_scaling=dict(rope_type="linear", factor=4.0)),
    "qwen2": LLAMA | dict(attention_bias=True, attention_output_bias=False),
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=32),
    "mixtral": LLAMA | dict(num_experts=4, moe_intermediate_size=64, tie_word_embeddings=False),
    "qwen3_moe": LLAMA | dict(qk_normalization=True, num_experts=4, moe_intermediate_size=64),
}
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=330, min_frequency=1)


def model_of(**fields):
    return random_model(**{**SIZES, "vocab_size": 340, **fields})


def stream_of(model):
    state = model.state_dict()
    return lambda names: ((name, state[name]) for name in names)


def write(path, model, *args, **kwargs):
    return write_gguf(path, model.config, stream_of(model), *args, **kwargs)


def greedy(model, ids, count):
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@needs_llama_cpp
def test_llama_cpp_computes_every_family(tmp_path, tokenizer):
    ids = [tokenizer.encode(text)[:20] for text in TEXTS]
    models = {name: model_of(**fields) for name, fields in FAMILIES.items()}
    tasks = [
        dict(file=write(tmp_path / f"{name}.gguf", model, tokenizer, "f32"), prompts=TEXTS, ids=ids, new=8)
        for name, model in models.items()
    ]
    for (name, model), found in zip(models.items(), ask(*tasks)):
        assert found["tokens"] == [tokenizer.encode(text) for text in TEXTS]
        for row, logits, chosen in zip(ids, found["logits"], found["greedy"]):
            with torch.no_grad():
                ours = model(torch.tensor([row])).logits[0]
            # llama.cpp looks its GELU up in a table of float16
            bound = 5e-3 if name.startswith("gpt2") else 1e-5
            assert (torch.tensor(logits) - ours).abs().max() <= bound * ours.abs().max(), name
            assert chosen == greedy(model, row, 8), name


@needs_llama_cpp
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_llama_cpp_computes_with_every_precision(tmp_path, tokenizer, family):
    """Beside our model with the file's numbers: what differs then is how products are rounded."""
    ids = tokenizer.encode(TEXTS[0])[:20]
    model = model_of(**FAMILIES[family])
    files = [write(tmp_path / f"{name}.gguf", model, tokenizer, name) for name in PRECISIONS]
    for path, found in zip(files, ask(*(dict(file=path, ids=[ids], new=1) for path in files))):
        rounded = model_of(**FAMILIES[family])
        rounded.load_state_dict(as_stored(path, rounded), strict=False)
        with torch.no_grad():
            ours = rounded(torch.tensor([ids])).logits[0]
        difference = (torch.tensor(found["logits"][0]) - ours).abs().max() / ours.abs().max()
        assert difference < (0.05 if "_" in path.stem else 0.01), path.stem


def as_stored(path, model):
    """The numbers of a file under our names."""
    from mtnlg.interop.gguf_families import gguf_tensors

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for tensor in gguf_tensors(model.config):
        if not tensor.ours:
            continue
        found = stored[tensor.name]
        whole = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        whole = whole.float().reshape(tensor.shape)
        if tensor.heads is not None:
            whole = whole.unflatten(0, (tensor.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        state |= zip(tensor.ours, whole.chunk(len(tensor.ours)) if len(tensor.ours) > 1 else [whole])
    return state


@needs_llama_cpp
def test_text_and_chat_template_go_along(tmp_path, tokenizer):
    """A model that has learned two texts by heart says them in llama.cpp, too."""
    told = Tokenizer(tokenizer.definition, {"chat_template": "{{ messages[0].content }}<|end|>"})
    model = random_model(**{**SIZES, **FAMILIES["llama"], "vocab_size": 340})
    learn_by_heart(model, [told.encode(text) for text in TEXTS[:2]])
    path = write(tmp_path / "m.gguf", model, told, "f32")
    (found,) = ask(dict(file=path, complete=["秋天的夜晚，", "The value"], new=8))
    assert found["template"] == "{{ messages[0].content }}<|end|>"
    for text, prompt, continued in zip(TEXTS, ("秋天的夜晚，", "The value"), found["texts"]):
        assert len(continued) > 3 and text.startswith(prompt + continued)


def learn_by_heart(model, rows):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = sum(model(torch.tensor([row[:-1]]), labels=torch.tensor([row[1:]])).loss for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def test_nothing_is_lost_at_full_precision(tmp_path, tokenizer):
    for name, fields in FAMILIES.items():
        model = model_of(**fields)
        state = as_stored(write(tmp_path / f"{name}.gguf", model, tokenizer, "f32"), model)
        expected = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del expected["head.output.weight"]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if "rotary_scaling" not in FAMILIES[name]])
def test_a_file_is_a_model_again(tmp_path, tokenizer, name, precision):
    """The weights as the file's own library reads them; the same tokens; the same architecture."""
    told = Tokenizer(tokenizer.definition, {"chat_template": "{{ messages[0].content }}"})
    model = model_of(**FAMILIES[name])
    files = open_model_files(write(tmp_path / "m.gguf", model, told, precision))
    differing = {
        field
        for field, value in model.config.to_dict().items()
        if getattr(files.config, field) != value and field != "init_method_std"
    }
    assert differing <= {"intermediate_size", "num_key_value_heads", "moe_intermediate_size"} | OPTIONAL
    expected = as_stored(tmp_path / "m.gguf", model)
    weights = dict(files.stream(None))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key].float(), expected[key]) for key in expected)
    assert files.tokenizer.chat_template == told.chat_template
    assert files.tokenizer.special_tokens == told.special_tokens
    for text in TEXTS:
        ids = told.encode(text)
        assert files.tokenizer.encode(text) == ids and files.tokenizer.decode(ids) == text


OPTIONAL = {"attention_output_bias", "mlp_bias"}  # unset, or of a layer without a dense MLP


def test_damaged_files_and_other_models_are_refused(tmp_path, tokenizer):
    path = write(tmp_path / "m.gguf", model_of(**FAMILIES["llama"]), tokenizer, "f32")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or not a GGUF file"):
        open_model_files(path)
    path.write_bytes(content.replace(b"llama", b"gguul"))
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'gguul': only gpt2, llama"):
        open_model_files(path)


def test_few_bits_are_where_they_do_little_harm(tmp_path, tokenizer):
    model = model_of(**FAMILIES["llama"], intermediate_size=80)
    path = write(tmp_path / "m.gguf", model, tokenizer, "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16", "80 columns are no whole number of blocks"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"


def test_ids_without_a_token_are_unused_ones(tmp_path, tokenizer):
    path = write(tmp_path / "m.gguf", model_of(**FAMILIES["llama"]), tokenizer, "f32")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == 340 and len(set(tokens)) == 340
    assert types[:6] == [int(gguf.TokenType.CONTROL)] * 6
    assert types[6] == int(gguf.TokenType.NORMAL)
    assert types[-1] == int(gguf.TokenType.UNUSED)


def test_sentencepiece_style_merges_become_scores(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    core.train_from_iterator(["the cat sat on the mat and the hat"] * 4, trainer)
    definition = json.loads(core.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    tokenizer = Tokenizer(json.dumps(definition), {"eos_token": "</s>", "bos_token": "<s>"})
    path = write(tmp_path / "m.gguf", model_of(**FAMILIES["llama"]), tokenizer, "f32")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "llama"
    texts = ["the cat", "that hat é 猫", "on the mat"]
    if needs_llama_cpp.args[0] is False:
        (found,) = ask(dict(file=path, prompts=texts))
        assert found["tokens"] == [tokenizer.encode(text) for text in texts]


def test_what_llama_cpp_cannot_do_is_refused(tmp_path, tokenizer):
    path = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match=r"'geglu'.*swiglu only"):
        write(path, model_of(**LLAMA | dict(activation_function="geglu")), tokenizer)
    with pytest.raises(ConfigError, match="choose one of f32, f16"):
        write(path, model_of(**LLAMA), tokenizer, "q3")
    with pytest.raises(ConfigError, match="tokens and the model 71"):
        write(path, model_of(**LLAMA, vocab_size=71), tokenizer)
    definition = json.loads(tokenizer.definition)
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x+"
    with pytest.raises(ConfigError, match="no name for how this tokenizer cuts text"):
        write(path, model_of(**LLAMA), Tokenizer(json.dumps(definition)))
    scaling = dict(rope_type="linear", factor=2.0)
    with pytest.raises(
        ConfigError, match=r"rotary_scaling is 'linear' in a qwen3: it must be linear or llama3"
    ):
        write(path, model_of(**FAMILIES["qwen3"], rotary_scaling=scaling), tokenizer)
    write(path, model_of(**FAMILIES["llama-linear"]), tokenizer)
    with pytest.raises(CheckpointError, match="rotary positions are scaled"):
        open_model_files(path)
    path.unlink()
    broken = model_of(**LLAMA)
    broken.layers["1"].mlp.up.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=re.escape("layers.1.mlp.up.weight: the weights hold NaN")):
        write(path, broken, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_family_is_refused(tmp_path):
    config = MegatronModelConfig(**LLAMA | dict(normalization="layernorm"))
    with pytest.raises(ConfigError, match="normalization is 'layernorm'"):
        write_gguf(tmp_path / "m.gguf", config, lambda names: [])

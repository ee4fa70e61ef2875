"""What llama.cpp computes of our GGUF files: every family, precision, tokenizer, in one process."""

from __future__ import annotations

import pytest
import torch
from tests.interop.gguf_models import BY_TABLE, FAMILIES, IDS, LLAMA, TEXTS, continued, model_of, write
from tests.interop.gguf_tokenizers import TEXTS as PLAIN_TEXTS
from tests.interop.gguf_tokenizers import likely_pieces, merging_pieces
from tests.interop.llama import ask, needs_llama_cpp

from mtnlg.interop.gguf_precision import PRECISIONS, file_type, kind_of
from mtnlg.interop.gguf_tensors import gguf_tensors
from mtnlg.tokens import Tokenizer
from mtnlg.training.model_files import open_model_files

gguf = pytest.importorskip("gguf", reason="needs the interop extra (gguf)")
pytestmark = needs_llama_cpp
WIDE = LLAMA | dict(hidden_size=256, intermediate_size=256, num_hidden_layers=3, tie_word_embeddings=False)
MIXTURES = [name for name in PRECISIONS if "_k" in name]
OTHER = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=3)
OTHERS = {  # whose tensors the mixtures treat otherwise
    "other-gpt2": FAMILIES["gpt2"] | OTHER,
    "other-mixtral": FAMILIES["mixtral"] | OTHER | dict(num_experts=8, moe_intermediate_size=256),
    "other-qwen2_moe": FAMILIES["qwen2_moe"] | OTHER | dict(moe_intermediate_size=256),
}
FEW_MIXTURES = {name: int(file_type(name)) for name in ("q4_k_m", "q2_k")}
LONG = 512  # tokens of context, more than what the short factors of LongRoPE are for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer.train(TEXTS * 3, vocab_size=330, min_frequency=1)
    return Tokenizer(trained.definition, {"chat_template": "{{ messages[0].content }}<|end|>"})


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A model that has two texts by heart."""
    model = model_of(**LLAMA)
    rows = [tokenizer.encode(text) for text in TEXTS[:2]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = sum(model(torch.tensor([row[:-1]]), labels=torch.tensor([row[1:]])).loss for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def wide_model():
    """Rows of 256 numbers, so small that what rounding does no layer makes larger."""
    model = model_of(**WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.35 if parameter.dim() > 1 else 1.0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def answers(folder, tokenizer, learned):
    """llama.cpp's to everything below, by name."""
    tasks = {}
    for name, fields in FAMILIES.items():
        file = write(folder / f"{name}.gguf", model_of(**fields), None, "f32")
        tasks[name] = dict(file=file, ids=IDS, new=6)
        if "longrope" in name:
            tasks[f"{name}, long"] = dict(file=file, ids=IDS, new=6, context=LONG)
    wide = wide_model()
    full = write(folder / "full.gguf", wide, None, "f32")
    tasks["quantized"] = dict(file=full, quantize={name: int(file_type(name)) for name in MIXTURES})
    for name, fields in OTHERS.items():
        file = write(folder / f"{name}.gguf", model_of(**fields), None, "f32")
        tasks[f"{name}, quantized"] = dict(file=file, quantize=FEW_MIXTURES)
    for name in PRECISIONS:
        tasks[name] = dict(file=write(folder / f"{name}.gguf", wide, None, name), ids=IDS[:1], new=1)
    told = dict(complete=["秋天的夜晚，", "The value"], new=8, prompts=TEXTS)
    tasks["text"] = dict(file=write(folder / "text.gguf", learned, tokenizer, "f32"), **told)
    small = model_of(**LLAMA)
    for name, made in (("merging", merging_pieces()), ("likely", likely_pieces())):
        tasks[name] = dict(file=write(folder / f"{name}.gguf", small, made, "f16"), prompts=PLAIN_TEXTS)
    return dict(zip(tasks, ask(*tasks.values())))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_every_family(answers, name):
    model = model_of(**FAMILIES[name])
    bound = 2e-2 if name == "t5-gated" else 5e-3 if name.startswith(BY_TABLE) else 1e-5
    found = answers[name]
    for row, logits, chosen in zip(IDS, found["logits"], found["greedy"], strict=True):
        ours, expected = continued(model, row, 6)
        assert (torch.tensor(logits) - ours).abs().max() <= bound * ours.abs().max()
        assert chosen == expected


@pytest.mark.parametrize("name", [name for name in FAMILIES if "longrope" in name])
def test_a_long_context_has_the_long_factors(answers, name):
    """Of all tokens, where ours look at how long the text is."""
    fields = FAMILIES[name]
    scaling = fields["rotary_scaling"] | dict(short_factor=fields["rotary_scaling"]["long_factor"])
    ours, expected = continued(model_of(**fields | dict(rotary_scaling=scaling)), IDS[0], 6)
    found = answers[f"{name}, long"]
    assert (torch.tensor(found["logits"][0]) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert found["greedy"][0] == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_computes_with_every_precision(answers, folder, precision):
    """Beside our model with the file's numbers: what differs then is how products are rounded."""
    rounded = wide_model()
    rounded.load_state_dict(open_model_files(folder / f"{precision}.gguf").read())
    ours, _ = continued(rounded, IDS[0], 1)
    difference = (torch.tensor(answers[precision]["logits"][0]) - ours).abs().max() / ours.abs().max()
    assert difference < (0.05 if "_" in precision else 0.01)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_its_own_quantizer_is_no_better(answers, folder, mixture):
    """Tensors have the formats it gives them; the error of each is at most 1.05 times that of its own."""
    full, ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(folder / name).tensors}
        for name in ("full.gguf", f"{mixture}.gguf", f"full.gguf.{mixture}")
    )
    kinds = {
        name: (tensor.tensor_type.name, theirs[name].tensor_type.name) for name, tensor in ours.items()
    }
    assert {name: pair for name, pair in kinds.items() if pair[0] != pair[1]} == {}
    for name, tensor in ours.items():
        errors = [_error(one, full[name]) for one in (tensor, theirs[name])]
        assert errors[0] <= 1.05 * errors[1], (name, tensor.tensor_type.name)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_have_the_formats_that_it_gives_them(answers, folder, name):
    config = model_of(**OTHERS[name]).config
    for mixture in FEW_MIXTURES:
        stored = gguf.GGUFReader(folder / f"{name}.gguf.{mixture}").tensors
        theirs = {tensor.name: tensor.tensor_type for tensor in stored}
        assert theirs == {tensor.name: kind_of(tensor, mixture, config) for tensor in gguf_tensors(config)}


def _error(stored, full):
    numbers = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(full.data.shape)
    return float(((numbers - full.data) ** 2).mean() ** 0.5)


def test_text_and_chat_template_go_along(answers, tokenizer):
    found = answers["text"]
    assert found["template"] == "{{ messages[0].content }}<|end|>"
    assert found["tokens"] == [tokenizer.encode(text) for text in TEXTS]
    for text, prompt, continuation in zip(TEXTS, ("秋天的夜晚，", "The value"), found["texts"]):
        assert len(continuation) > 3 and text.startswith(prompt + continuation)


def test_pieces_that_merge_have_the_same_ids(answers, folder):
    tokenizer = merging_pieces()
    expected = [tokenizer.encode(text) for text in PLAIN_TEXTS]
    assert answers["merging"]["tokens"] == expected
    back = open_model_files(folder / "merging.gguf").tokenizer
    assert [back.encode(text) for text in PLAIN_TEXTS] == expected


def test_likely_pieces_have_the_same_ids(answers):
    tokenizer = likely_pieces()
    ids = [tokenizer.encode(text)[:-1] for text in PLAIN_TEXTS]
    assert [row[: len(one)] for row, one in zip(answers["likely"]["tokens"], ids)] == ids

"""Encoder-decoders as people use them: folders, text and generation, beside transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.test_encoder_decoder_families import LABELS, MASK, SOURCE, make_theirs

from mtnlg import (
    MegatronEncoderDecoderModel,
    MegatronLmModel,
    MegatronModelConfig,
    MT5ForConditionalGeneration,
    MT5Tokenizer,
    T5ForConditionalGeneration,
)
from mtnlg.config import CheckpointError, ConfigError, EngineConfig
from mtnlg.generation import GenerationRequest, SamplingRules

TEXTS = Path(__file__).parents[1] / "data" / "zh"
QUESTION = "人工智能的未来发展趋势是什么？"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs the interop extra (transformers)")


def write_spiece(folder: Path) -> None:
    """A SentencePiece model of the repository's own texts, with T5's special tokens."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="makes the test's spiece.model")
    lines = [line for path in sorted(TEXTS.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_prefix=str(folder / "spiece"),
        vocab_size=2100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, num_threads=1,
        character_coverage=0.98, minloglevel=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mt5_folder(transformers, tmp_path_factory) -> Path:
    """A small mT5 with random weights as transformers writes it, and a spiece.model beside it."""
    folder = tmp_path_factory.mktemp("mt5")
    config = transformers.MT5Config(
        vocab_size=2304, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, initializer_factor=1.0
    )
    torch.manual_seed(0)
    theirs = transformers.MT5ForConditionalGeneration(config)
    theirs.generation_config.pad_token_id = 0
    theirs.save_pretrained(folder)
    write_spiece(folder)
    return folder


def test_the_program_of_mt5_users_runs_as_written(mt5_folder, transformers, tmp_path):
    page = (TEXTS.parents[1] / "docs" / "encoder-decoder.md").read_text("utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"model_name": str(mt5_folder), "print": lambda text: names.update(said=text)}
    exec(program, names)
    theirs = transformers.MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    expected = theirs.generate(names["input_ids"], max_new_tokens=64, do_sample=False)
    assert torch.equal(names["output_ids"], expected)
    assert names["said"] == names["tokenizer"].decode(expected[0], skip_special_tokens=True)
    assert "<pad>" not in names["said"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
        {"repetition_penalty": 1.3},
        {"num_beams": 2, "early_stopping": "never"},
    ],
)
@pytest.mark.parametrize("name", ["t5-1.1", "umt5"])
def test_generations_are_transformers(transformers, tmp_path_factory, name, options):
    folder = tmp_path_factory.mktemp("theirs")
    theirs = make_theirs(transformers, name, folder)
    ours = MegatronEncoderDecoderModel.from_pretrained(folder)
    # Without a cache: transformers 5 makes one for as many layers as the encoder has.
    expected = theirs.generate(
        SOURCE, attention_mask=MASK, max_length=18, do_sample=False, use_cache=False, **options
    )
    # After the end (1) there is only filling; their beam search takes 1 for that, where padding is 0.
    expected = expected.masked_fill((expected == 1).cumsum(1) > 1, 0)
    found = ours.generate(SOURCE, attention_mask=MASK, max_length=18, **options)
    assert torch.equal(found, expected)
    filled = SOURCE.masked_fill(MASK == 0, 0)
    assert torch.equal(ours.generate(filled, max_length=18, **options), expected)


def test_text_in_text_out(mt5_folder):
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    tokenizer = MT5Tokenizer.from_pretrained(mt5_folder)
    ids = model.generate(tokenizer.encode(QUESTION), max_new_tokens=9)
    assert ids[0] == model.config.decoder_start_token_id
    assert len(ids) <= 10
    said = model.generate(QUESTION, max_new_tokens=9)
    assert said == tokenizer.decode(ids)
    assert model.generate([QUESTION, "海"], max_new_tokens=9)[0] == said
    pieces: list[str] = []
    model.generate(QUESTION, max_new_tokens=9, streamer=pieces.append)
    assert "".join(pieces) == said
    detailed = model.generate(QUESTION, max_new_tokens=9, details=True, logprobs=0)
    assert detailed.usage.prompt_tokens == len(tokenizer.encode(QUESTION))
    assert len(detailed.logprobs) == len(detailed.new_ids)


def test_requests_together_get_what_each_gets_alone(mt5_folder):
    """Sources and lengths of all kinds in one batch, drawn and greedy, with few pages."""
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    rows = [SOURCE[n % 3, : 3 + 2 * n].tolist() for n in range(9)]
    requests = [
        GenerationRequest(
            row,
            rules=SamplingRules(temperature=1.0, seed=n) if n % 2 else SamplingRules(),
            max_new_tokens=5 + 3 * n,
        )
        for n, row in enumerate(rows)
    ]
    alone = [model.make_engine().submit(request).result().new_ids for request in requests]
    engine = model.make_engine(EngineConfig(cache_gib=1e-5 * 5, max_batch_size=4))
    together = [engine.submit(request) for request in requests]
    assert [generation.result().new_ids for generation in together] == alone
    deterministic = model.make_engine(EngineConfig(deterministic=True))
    many = [deterministic.submit(request) for request in requests]
    assert [generation.result().new_ids for generation in many] == alone


def test_changed_weights_are_noticed_and_embeddings_are_the_encoders(mt5_folder):
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    before = model.generate(SOURCE, max_new_tokens=12)
    ids = SOURCE[0].tolist()
    expected = model.encode(SOURCE[:1])[0]
    torch.testing.assert_close(model.make_engine().embed(ids), expected)
    with torch.no_grad():
        model.get_parameter("layers.0.attention.value.weight").mul_(-3.0)
    assert not torch.equal(model.generate(SOURCE, max_new_tokens=12), before)


def test_what_cannot_be_answered_is_said(mt5_folder):
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    for prompt, said in (([], "the prompt is empty"), ([5000], "the prompt holds token 5000")):
        with pytest.raises(ConfigError, match=said):
            model.generate(prompt)
    with pytest.raises(ConfigError, match="5000 tokens and the model 4096 positions"):
        model.generate([5] * 5000)
    with pytest.raises(ConfigError, match="contrastive search is for decoders"):
        model.generate([5], penalty_alpha=0.5, top_k=4)
    with pytest.raises(TypeError, match="unexpected option 'num_beam'"):
        model.generate([5], num_beam=2)


def test_a_model_saved_is_the_same_model(mt5_folder, tmp_path, transformers):
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    model.save_pretrained(tmp_path)
    again = MegatronEncoderDecoderModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.generate(QUESTION, max_new_tokens=8) == model.generate(QUESTION, max_new_tokens=8)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids = torch.tensor([model.tokenizer.encode(QUESTION)])
    assert torch.equal(theirs(ids, labels=LABELS[1:2]).logits.argmax(-1).shape and theirs.shared.weight,
                       model.embedding.tokens.weight)  # fmt: skip
    read = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert read(QUESTION).input_ids == ids[0].tolist()


def test_classes_know_which_models_are_theirs(mt5_folder, tmp_path):
    assert isinstance(MegatronLmModel.from_pretrained(mt5_folder), MegatronEncoderDecoderModel)
    decoder = MegatronLmModel(MegatronModelConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1,
                                                  num_attention_heads=2))  # fmt: skip
    decoder.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a decoder: open it with MegatronLmModel"):
        T5ForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="MegatronLmModel is the class of decoders"):
        MegatronEncoderDecoderModel(decoder.config)
    config = MT5ForConditionalGeneration.from_pretrained(mt5_folder).config
    with pytest.raises(ConfigError, match="use MegatronEncoderDecoderModel"):
        MegatronLmModel(config)
    with torch.device("meta"):
        assert MegatronEncoderDecoderModel(config).num_parameters == config.num_parameters


def test_weights_that_do_not_fit_are_named(mt5_folder):
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    from mtnlg.pretrained import check_weights

    weights = dict(model.state_dict())
    weights["layers.2.cross_attention.key.weight"] = torch.zeros(3, 3)
    del weights["layers.1.mlp.up.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up\.weight is missing") as caught:
        check_weights(model, weights, "here")
    assert "layers.2.cross_attention.key.weight has the shape [3, 3], the model's is [24, 24]" in str(
        caught.value
    )


def test_rounded_to_few_bits_it_still_writes_nearly_the_same(mt5_folder):
    exact = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    rounded = MT5ForConditionalGeneration.from_pretrained(mt5_folder, quantize=True)
    assert rounded.num_parameters == exact.num_parameters
    logits = [model(SOURCE, LABELS.clamp_min(0)).logits for model in (exact, rounded)]
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.05
    assert len(rounded.generate(SOURCE[0].tolist(), max_new_tokens=5)) >= 2


def test_the_terminal_generates_with_an_encoder_decoder(mt5_folder):
    command = [
        sys.executable,
        "-m",
        "mtnlg",
        "generate",
        str(mt5_folder),
        QUESTION,
        *("--max-new-tokens", "6", "--temperature", "1", "--top-k", "0", "--top-p", "1", "--seed", "4"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    model = MT5ForConditionalGeneration.from_pretrained(mt5_folder)
    chance = dict(temperature=1.0, top_k=0, top_p=1.0, seed=4)  # the likeliest text of this model is empty
    answer = model.generate(QUESTION, max_new_tokens=6, **chance).strip()
    assert answer and answer == ran.stdout.strip()

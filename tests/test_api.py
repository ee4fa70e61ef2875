from __future__ import annotations

import copy
import pickle
import re
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
from mtnlg.config import CheckpointError, ConfigError, DataConfig, LayoutConfig, RunConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.config.load import save_run_config
from mtnlg.generation import GenerationRequest
from mtnlg.parallel.mesh import build_mesh
from mtnlg.training.checkpoints import save_checkpoint

TEXTS = ["秋天的夜晚，星光闪烁，万籁俱寂。", "The night was quiet and the stars were bright. 🌙"] * 5
PROMPT = "秋天的夜晚，星光闪烁，"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


def make_config(**fields: Any) -> MegatronModelConfig:
    shape = dict(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_method_std=0.3,
    )
    return MegatronModelConfig(**{**shape, **fields})


@pytest.fixture
def model(tokenizer: Tokenizer) -> MegatronLmModel:
    return MegatronLmModel(make_config(), tokenizer).eval()


def save_run(model: MegatronLmModel, run_dir: Path, step: int = 3) -> Path:
    """A run's folder as training leaves it."""
    data = DataConfig(sequence_length=32)
    config = RunConfig(run_dir=str(run_dir), model=model.config, data=data)
    run_dir.mkdir(exist_ok=True)
    save_run_config(config, run_dir / "config.yaml")
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(run_dir / "tokenizer")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {"step": step, "config": config.to_dict()}
    return save_checkpoint(run_dir, step, {"weights": weights}, state, build_mesh(LayoutConfig(), "cpu"))


def logits(model: MegatronLmModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


# -- construction


def test_it_is_a_module_with_logits(model):
    found = model(torch.zeros(2, 5, dtype=torch.long)).logits
    assert isinstance(model, torch.nn.Module)
    assert found.shape == (2, 5, 320)


def test_presets_and_meta():
    with torch.device("meta"):
        model = MegatronLmModel(MegatronModelConfig.from_preset("mt-nlg-530b"))
    assert model.is_meta
    assert model.num_parameters == model.config.num_parameters
    assert round(model.num_parameters / 1e9, 1) == 529.6


def test_the_seed_decides_the_weights():
    first, same, other = (MegatronLmModel(make_config(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first.eval()), logits(same.eval()))
    assert not torch.equal(logits(first), logits(other.eval()))


# -- generation


def test_text_in_text_out(model, tokenizer):
    text = model.generate(PROMPT, max_length=30)
    assert text.startswith(PROMPT)
    start = [tokenizer.end_of_text_id]
    ids = model.generate(start + tokenizer.encode(PROMPT), max_length=31)
    assert text == tokenizer.decode(ids).removesuffix("\N{REPLACEMENT CHARACTER}")


def test_max_length_counts_the_prompt(model, tokenizer):
    num_prompt = len(tokenizer.encode(PROMPT))
    heard: list[int] = []
    ids = model.generate(tokenizer.encode(PROMPT), max_length=30, end_ids=[], streamer=heard.append)
    assert len(ids) == 30
    assert len(heard) == 30 - num_prompt
    assert len(model.generate([1, 2, 3], max_new_tokens=4, end_ids=[])) == 7


def test_texts_ids_and_tensors_come_back_as_they_went_in(model, tokenizer):
    texts = model.generate([PROMPT, "The"], max_new_tokens=5)
    assert texts == [model.generate(prompt, max_new_tokens=5) for prompt in (PROMPT, "The")]
    assert isinstance(texts, list)
    rows = model.generate([[5, 6, 7], [8]], max_new_tokens=3, end_ids=[])
    assert [row[:-3] for row in rows] == [[5, 6, 7], [8]]
    assert rows[1] == model.generate([8], max_new_tokens=3, end_ids=[])
    flat = model.generate(torch.tensor([5, 6, 7]), max_new_tokens=3, end_ids=[])
    assert flat.tolist() == rows[0]
    batch = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, end_ids=[])
    assert batch.tolist() == [rows[0]]
    assert batch.dtype == torch.long
    encoded = tokenizer.encode(PROMPT, return_tensors="pt")
    assert model.generate(encoded, max_new_tokens=2, end_ids=[]).shape == (1, encoded.shape[1] + 2)


def test_tensor_rows_that_end_early_are_filled_with_padding(model, tokenizer):
    prompts = torch.tensor([[5, 6, 7], [9, 9, 9]])
    free = model.generate(prompts, max_new_tokens=8, end_ids=[])
    end = int(free[0, 4])
    found = model.generate(prompts, max_new_tokens=8, end_ids=[end])
    stop = free[0].tolist().index(end, 3) + 1
    assert found[0, :stop].tolist() == free[0, :stop].tolist()
    assert set(found[0, stop:].tolist()) <= {tokenizer.padding_id}


def test_the_tokenizers_end_of_text_ends_by_default(model, tokenizer):
    with torch.no_grad():  # make it the most likely token everywhere
        model.head.norm.weight.zero_()
        model.head.norm.bias.copy_(model.embedding.tokens.weight[tokenizer.end_of_text_id] * 10)
    assert model.generate(PROMPT, max_length=30) == PROMPT
    assert model.generate([5, 6], max_new_tokens=9) == [5, 6, tokenizer.end_of_text_id]


def test_a_document_starts_with_the_token_between_documents(model, tokenizer):
    plain = model.generate(PROMPT, max_length=30, start_of_document=False)
    ids = model.generate(tokenizer.encode(PROMPT), max_length=30)
    assert plain == tokenizer.decode(ids).removesuffix("\N{REPLACEMENT CHARACTER}")
    assert plain != model.generate(PROMPT, max_length=30)
    assert model.generate("", max_new_tokens=3) == model.generate("", max_new_tokens=3)


def test_sampling_is_repeatable_and_greedy_is_the_default(model):
    draw = lambda **options: model.generate(PROMPT, max_length=40, **options)  # noqa: E731
    assert draw() == draw()
    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1)
    assert draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    assert draw(top_k=1) == draw() == draw(temperature=0.0, top_p=0.5)


def test_streamed_pieces_add_up_and_hold_whole_characters(model):
    pieces: list[str] = []
    text = model.generate(PROMPT, max_length=60, temperature=2.0, seed=0, streamer=pieces.append)
    assert PROMPT + "".join(pieces) == text
    assert all(pieces)
    with pytest.raises(ConfigError, match="one prompt"):
        model.generate([PROMPT, PROMPT], streamer=pieces.append)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="no tokenizer"):
        MegatronLmModel(make_config()).generate(PROMPT)


def test_a_tensor_of_floats_is_refused(model):
    with pytest.raises(ConfigError, match="float32"):
        model.generate(torch.zeros(1, 3))


def test_several_continuations_of_each_prompt(model):
    found = model.generate([PROMPT, "The"], max_new_tokens=6, temperature=2.0, seed=3, n=3)
    assert [len(several) for several in found] == [3, 3]
    assert len(set(found[0])) > 1 and all(text.startswith("The") for text in found[1])
    alone = model.generate(PROMPT, max_new_tokens=6, temperature=2.0, seed=3, n=3)
    assert alone == found[0]
    assert model.generate(PROMPT, max_new_tokens=6, temperature=2.0, seed=3) == alone[0]
    assert model.generate([5, 6], max_new_tokens=2, end_ids=[], n=1) == [
        model.generate([5, 6], max_new_tokens=2, end_ids=[])
    ]
    rows = model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, end_ids=[], n=2, temperature=1.0)
    assert [len(ids) for ids in rows[0]] == [4, 4]


def test_the_best_of_several_is_the_likeliest(model):
    options = dict(max_new_tokens=6, temperature=2.0, seed=3, details=True, end_ids=[])
    drawn = model.generate([5, 6], n=8, logprobs=0, **options)
    best = model.generate([5, 6], best_of=8, **options)
    score = lambda one: sum(token.logprob for token in one.logprobs) / len(one.logprobs)  # noqa: E731
    assert best.new_ids == max(drawn, key=score).new_ids
    two = model.generate([5, 6], n=2, best_of=8, **options)
    assert [one.new_ids for one in two] == [
        one.new_ids for one in sorted(drawn, key=score, reverse=True)[:2]
    ]


def test_details_have_scores_and_reasons(model, tokenizer):
    ids = tokenizer.encode(PROMPT)
    found = model.generate(ids, max_new_tokens=5, end_ids=[], details=True, logprobs=2, prompt_logprobs=0)
    assert found.ids[: len(ids)] == ids and len(found.new_ids) == 5
    assert found.finish_reason == "length"
    assert [len(score.top) for score in found.logprobs] == [2] * 5
    assert len(found.prompt_logprobs) == len(ids)
    with torch.no_grad():
        expected = model(torch.tensor([found.ids])).logits[0].log_softmax(-1)
    for place, score in enumerate(found.logprobs, start=len(ids)):
        assert score.logprob == pytest.approx(float(expected[place - 1, found.ids[place]]), abs=1e-4)


def test_a_stop_text_ends_it(model):
    whole = model.generate(PROMPT, max_length=60, temperature=2.0, seed=0)
    stop = whole[len(PROMPT) + 3 : len(PROMPT) + 5]
    end = whole.index(stop, len(PROMPT))
    options = dict(max_length=60, temperature=2.0, seed=0, stop=stop)
    assert model.generate(PROMPT, **options) == whole[:end]
    assert model.generate(PROMPT, **options, include_stop=True) == whole[: end + 2]


def test_every_sampling_rule_reaches_the_sampler(model):
    ids = [5, 6, 7]
    base = model.generate(ids, max_new_tokens=8, end_ids=[])
    first = base[3]
    assert model.generate(ids, max_new_tokens=8, end_ids=[], logit_bias={first: float("-inf")})[3] != first
    assert len(model.generate(ids, max_new_tokens=8, end_ids=[first], min_new_tokens=3)) >= 6
    repeated = len(set(model.generate([9], max_new_tokens=50, end_ids=[])))
    for rule in (dict(frequency_penalty=2.0), dict(presence_penalty=2.0), dict(repetition_penalty=5.0)):
        assert len(set(model.generate([9], max_new_tokens=50, end_ids=[], **rule))) > repeated
    new = model.generate([5, 6, 5], max_new_tokens=30, end_ids=[], no_repeat_ngram_size=2)
    assert len({*pairwise(new)}) == len(new) - 1
    for rule in (dict(min_p=1.0), dict(top_k=1), dict(top_p=1e-9), dict(typical_p=1.0, temperature=0.0)):
        assert model.generate(ids, max_new_tokens=8, end_ids=[], **rule) == base


def test_searches(model):
    ids = [5, 6, 7]
    options = dict(max_new_tokens=6, end_ids=[])
    greedy = model.generate(ids, **options)
    beams = model.generate(ids, num_beams=4, n=3, details=True, **options)
    assert [len(one.new_ids) for one in beams] == [6, 6, 6]
    assert beams[0].score >= beams[1].score >= beams[2].score

    @torch.no_grad()
    def score(row):
        logprobs = model(torch.tensor([row[:-1]])).logits[0, 2:].log_softmax(-1)
        return float(logprobs.gather(1, torch.tensor(row[3:])[:, None]).sum())

    assert score(beams[0].ids) >= score(greedy) - 1e-4
    assert model.generate(ids, num_beams=4, **options) == beams[0].ids
    assert model.generate(PROMPT, num_beams=2, max_new_tokens=4).startswith(PROMPT)
    assert model.generate(ids, penalty_alpha=0.0, top_k=4, **options) == greedy
    assert model.generate(ids, penalty_alpha=0.9, top_k=4, **options) != greedy
    with pytest.raises(ConfigError, match=r"length_penalty.* needs num_beams above 1"):
        model.generate(ids, length_penalty=2.0)
    with pytest.raises(ConfigError, match=r"temperature is 0\.5"):
        model.generate(ids, num_beams=2, temperature=0.5)
    with pytest.raises(ConfigError, match="streamer is set"):
        model.generate(ids, num_beams=2, streamer=print)


def test_forms_of_the_continuation(model):
    pytest.importorskip("llguidance", reason="needs the guided extra")
    assert model.generate(PROMPT, choice=["yes", "no"])[len(PROMPT) :] in ("yes", "no")
    assert re.fullmatch(r"[0-9]{3}", model.generate(PROMPT, regex="[0-9]{3}")[len(PROMPT) :])
    found = model.generate(PROMPT, json_schema={"type": "boolean"}, temperature=1.0, n=2)
    assert {text[len(PROMPT) :] for text in found} <= {"true", "false"}
    with pytest.raises(ConfigError, match="regex and choice are given"):
        model.generate(PROMPT, regex="a", choice=["b"])
    model.tokenizer = None
    with pytest.raises(ConfigError, match="regex needs a tokenizer"):
        model.generate([5], regex="a")


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
def test_guessing_changes_no_token(model, speculation):
    prompt, options = [5, 6, 7] * 5, dict(max_new_tokens=30, end_ids=[])
    expected = model.generate(prompt, **options)
    model.engine_config = EngineConfig(speculation=speculation)
    if speculation == "draft":
        with pytest.raises(ConfigError, match="there is no draft model"):
            model.generate(prompt, **options)
        model.draft_model = MegatronLmModel(make_config(num_hidden_layers=1)).eval()
    assert model.generate(prompt, **options) == expected
    assert model._engine_keeper._engine.statistics.drafted_tokens > 0


def test_wrong_options_are_named(model):
    with pytest.raises(TypeError, match=r"'temprature'.* Did you mean 'temperature'"):
        model.generate(PROMPT, temprature=1.0)
    with pytest.raises(ConfigError, match="n is 0"):
        model.generate(PROMPT, n=0)
    with pytest.raises(ConfigError, match="best_of is 1"):
        model.generate(PROMPT, n=2, best_of=1)
    with pytest.raises(ConfigError, match="logprobs come with details"):
        model.generate(PROMPT, logprobs=1)
    with pytest.raises(ConfigError, match="prompt 1: the prompt is empty"):
        model.generate([[1], []])
    with pytest.raises(ConfigError, match="temperature is -1"):
        model.generate(PROMPT, temperature=-1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.5).step(),
        lambda model: [parameter.data.mul_(-0.5) for parameter in model.parameters()],
        lambda model: model.load_state_dict(MegatronLmModel(model.config, seed=5).state_dict()),
        lambda model: model.load_state_dict(
            MegatronLmModel(model.config, seed=5).state_dict(), assign=True
        ),
        lambda model: model.double(),
        lambda model: model.head.norm.register_forward_hook(lambda _module, _args, out: -out),
    ],
    ids=["training", "data", "load", "assign", "dtype", "hook"],
)
def test_changed_weights_count_at_once(model, change):
    ids = list(range(40))  # longer than a page of the prefix cache
    model.generate(ids, max_new_tokens=3, end_ids=[])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    change(model)
    found = model.generate(ids, max_new_tokens=8, end_ids=[])
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids


def test_later_calls_use_what_earlier_ones_computed(model):
    ids = list(range(40))
    options = dict(max_new_tokens=3, end_ids=[], details=True)
    assert model.generate(ids, **options).usage.cached_tokens == 0
    assert model.generate([*ids, 7], **options).usage.cached_tokens == 32


def test_a_model_that_has_generated_can_be_copied_and_pickled(model):
    expected = model.generate([5, 6], max_new_tokens=4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate([5, 6], max_new_tokens=4) == expected


def test_settings_of_the_engine(model):
    expected = model.generate([5, 6], max_new_tokens=4)
    model.engine_config = EngineConfig(deterministic=True, dtype="float32", prefill_chunk=1)
    assert model.generate([5, 6], max_new_tokens=4) == expected
    with model.make_engine().start() as engine:
        request = GenerationRequest([5, 6], max_new_tokens=4, end_ids=[model.tokenizer.end_of_text_id])
        assert engine.submit(request).result().ids == expected
        assert engine.embed([5, 6, 7]).shape == (3, 32)


# -- files


def test_a_run_comes_back(model, tmp_path):
    save_run(model, tmp_path / "run")
    again = MegatronLmModel.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert again.generate(PROMPT, max_length=30) == model.generate(PROMPT, max_length=30)
    assert again.head.output.weight is again.embedding.tokens.weight


def test_one_checkpoint_comes_back_with_its_runs_tokenizer(model, tmp_path):
    checkpoint = save_run(model, tmp_path / "run")
    again = MegatronLmModel.from_pretrained(str(checkpoint))
    assert torch.equal(logits(again), logits(model))
    assert again.tokenizer.encode(PROMPT) == model.tokenizer.encode(PROMPT)
    alone = shutil.copytree(checkpoint, tmp_path / "alone")
    assert MegatronLmModel.from_pretrained(alone).tokenizer is None


@pytest.mark.parametrize(
    "family", [{}, dict(position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
                        attention_bias=False, mlp_bias=False, tie_word_embeddings=False)]
)  # fmt: skip
def test_a_hugging_face_folder_comes_back(tokenizer, tmp_path, family):
    model = MegatronLmModel(make_config(**family), tokenizer).eval()
    model.save_pretrained(tmp_path)
    again = MegatronLmModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    assert again.generate(PROMPT, max_length=30) == model.generate(PROMPT, max_length=30)


def test_transformers_generates_the_same_from_what_we_save(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the interop extra (transformers)")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([model.tokenizer.encode(PROMPT)])
    assert their_tokenizer(PROMPT, add_special_tokens=False).input_ids == ids[0].tolist()
    expected = theirs.generate(ids, max_length=40, do_sample=False)
    assert model.generate(ids, max_length=40).tolist() == expected.tolist()


def test_precision_can_be_chosen(model, tmp_path):
    save_run(model, tmp_path / "run")
    again = MegatronLmModel.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert again.head.output.weight is again.embedding.tokens.weight


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(model, tmp_path):
    run = tmp_path / "run"
    save_run(model, run, step=1)
    newest = save_run(MegatronLmModel(make_config(), model.tokenizer, seed=9), run, step=2)
    file = next((newest / "weights").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.warns(UserWarning, match="step-00000002.*Using step-00000001"):
        again = MegatronLmModel.from_pretrained(run)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(CheckpointError, match="checksum"):
        MegatronLmModel.from_pretrained(newest)


def test_a_damaged_optimizer_does_not_matter_here(model, tmp_path):
    checkpoint = save_run(model, tmp_path / "run")
    (checkpoint / "optimizer").mkdir()
    (checkpoint / "optimizer" / "x.safetensors").write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MegatronLmModel.from_pretrained(tmp_path / "run")


def test_folders_that_hold_no_model_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        MegatronLmModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.yaml.*state\.json.*config\.json"):
        MegatronLmModel.from_pretrained(tmp_path)
    checkpoint = save_run(model, tmp_path / "run")
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        MegatronLmModel.from_pretrained(tmp_path / "run")


def test_a_misspelt_path_is_no_hub_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "poems").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no such folder: did you mean runs/poems\?"):
        MegatronLmModel.from_pretrained("runs/poem")


def test_weights_of_another_shape_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"n_embd": 32', '"n_embd": 64')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="do not fit config"):
        MegatronLmModel.from_pretrained(tmp_path)

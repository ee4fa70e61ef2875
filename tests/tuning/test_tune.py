"""Tuning runs: from any base, through the one trainer, resumable, in any layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.helpers import Recorder
from tests.tuning.helpers import (
    conversations,
    prepared,
    small_tuning,
    tokenizer,
    tune_here,
    tune_laid_out,
    write_base,
    write_lines,
)

from mtnlg import MegatronLmModel
from mtnlg.config import CheckpointError, ConfigError, DataError, LayoutConfig, StopConfig
from mtnlg.generation.dialogue_format import dialogue_prompt
from mtnlg.tuning import Tuning

LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "dp2 zero1": {"data_parallel_size": 2, "data_parallel_sharding": "zero1"},
    "dp2 zero3": {"data_parallel_size": 2, "data_parallel_sharding": "zero3"},
    "tp2 dp2": {"tensor_parallel_size": 2, "data_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def config(folder):
    return prepared(small_tuning(folder))


@pytest.fixture(scope="module")
def reference(config, folder):
    """Losses of the run in one process."""
    recorder = Recorder()
    tune_here(replace(config, run_dir=copy_of(config, folder / "reference")), recorder)
    return recorder.losses


def copy_of(config, run_dir):
    shutil.copytree(config.run_dir, run_dir, dirs_exist_ok=True)
    return str(run_dir)


def mean_loss(model, batch):
    with torch.no_grad():
        output = model(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
    return float(output.loss) / batch.num_valid_tokens


def test_first_loss_is_the_bases_on_scored_tokens_of_packed_samples(config, reference):
    base = MegatronLmModel.from_pretrained(config.tuning.base)
    batch = Tuning().training_stream(config).batch(0, 4)
    assert reference[1] == pytest.approx(mean_loss(base, batch), rel=1e-5)
    assert reference[6] < reference[1] - 0.5


def test_packing_changes_no_loss(config, folder):
    """The same examples one a sample: the mean over scored tokens is the same."""
    base = MegatronLmModel.from_pretrained(config.tuning.base)
    apart = prepared(small_tuning(folder, {"packing": False}, run_dir=str(folder / "apart")))
    losses = []
    for one in (config, apart):
        stream = Tuning().validation_stream(one, None)
        losses.append(mean_loss(base, stream.batch(0, stream.num_samples)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_trains_the_same_run(config, reference, folder, ranks, name):
    layout = LayoutConfig(**{"data_parallel_size": 1, **LAYOUTS[name]})
    run_dir = copy_of(config, folder / name.replace(" ", "-"))
    laid_out = replace(config, layout=layout, run_dir=run_dir, stop=StopConfig(steps=3))
    found = ranks.run(layout.num_ranks, tune_laid_out, laid_out)[0]
    assert found["losses"] == pytest.approx({step: reference[step] for step in (1, 2, 3)}, rel=2e-5)


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix"])
def test_an_interrupted_run_goes_on_where_it_was(folder, method):
    tuning = {"method": method, "adapter": None} if method == "full" else {"method": method}
    tuning.pop("adapter", None)
    config = prepared(small_tuning(folder, tuning, run_dir=str(folder / f"resumed-{method}")))
    whole, first, second = Recorder(), Recorder(), Recorder()
    tune_here(replace(config, run_dir=copy_of(config, folder / f"whole-{method}")), whole)
    part = tune_here(replace(config, stop=StopConfig(steps=4)), first)
    rest = tune_here(config, second)
    assert first.losses | second.losses == whole.losses
    assert sorted(second.losses) == [5, 6]
    assert part.first_validation_loss == rest.first_validation_loss > rest.validation_loss
    if method in ("full", "lora"):  # the others begin with virtual tokens before the text
        stream = Tuning().validation_stream(config, None)
        loss = mean_loss(
            MegatronLmModel.from_pretrained(config.tuning.base), stream.batch(0, stream.num_samples)
        )
        assert rest.first_validation_loss == pytest.approx(loss, rel=1e-5)


def test_adapters_are_saved_alone_and_only_they_change(folder):
    config = prepared(small_tuning(folder, {"method": "lora"}, run_dir=str(folder / "lora-only")))
    recorder = Recorder()
    result = tune_here(config, recorder)
    assert recorder.losses[6] < recorder.losses[1]
    size = sum(file.stat().st_size for file in Path(result.checkpoint, "weights").iterdir())
    base = sum(file.stat().st_size for file in Path(config.tuning.base).glob("*.safetensors"))
    assert size < base / 4


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_the_run_of_an_adapter_is_its_base_with_the_adapter(folder, method):
    """As a run and as the adapter's folder beside it, with the validation loss that training measured."""
    config = prepared(small_tuning(folder, {"method": method}, run_dir=str(folder / f"model-{method}")))
    result = tune_here(config)
    stream = Tuning().validation_stream(config, None)
    batch = stream.batch(0, stream.num_samples)
    for path in (config.run_dir, f"{config.run_dir}/adapter"):
        model = MegatronLmModel.from_pretrained(path)
        assert model.tokenizer.chat_template is not None
        loss = mean_loss(model, batch)
        assert loss == pytest.approx(result.validation_loss, rel=1e-5)


def test_the_tuned_run_is_a_model_that_answers(folder, tmp_path):
    """Overfitted on one answer, it gives it, through the template that was saved along."""
    lines = write_lines(tmp_path / "chats.jsonl", [conversations()[0]] * 4)
    tuning = {"data": [str(lines)], "validation_share": 0.0, "epochs": 10.0}
    config = small_tuning(folder, tuning, run_dir=str(tmp_path / "run"))
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.02))
    config = prepared(replace(config, batch=replace(config.batch, micro_batch_size=1, global_batch_size=1)))
    result = tune_here(config)
    assert result.step == 10 and result.validation_loss is None
    model = MegatronLmModel.from_pretrained(config.run_dir)
    question, answer = conversations()[0]["messages"]
    prompt = dialogue_prompt(model.tokenizer, [question])
    wanted = [*model.tokenizer.encode(answer["content"]), model.tokenizer.special_tokens["<|end|>"]]
    ids = model.generate(prompt.ids, max_new_tokens=len(wanted), temperature=0.0)
    assert list(ids)[-len(wanted) :] == wanted
    assert (Path(config.run_dir) / "tokenizer" / "chat_template.jinja").is_file()


def test_data_is_read_once_and_must_not_change_under_a_run(folder, tmp_path):
    lines = write_lines(tmp_path / "chats.jsonl", conversations())
    config = small_tuning(folder, {"data": [str(lines)]}, run_dir=str(tmp_path / "run"))
    told = []
    first = Tuning(told.append).prepare(config, lambda *_: None)
    work = Tuning(told.append)
    again = []
    assert work.prepare(first, lambda *args: again.append(args)) == first
    assert again == [] and told[0] == told[1]
    assert "scored" in told[0] and told[0].count("-- example") == 3 and "⟦" in told[0]
    tune_here(first)
    write_lines(lines, conversations(20))
    with pytest.raises(DataError, match="changed since the run"):
        prepared(first)
    shutil.copy(folder / "chats.jsonl", lines)


def test_a_run_is_not_resumed_as_another(config, folder):
    run_dir = copy_of(config, folder / "another")
    tune_here(replace(config, run_dir=run_dir, stop=StopConfig(steps=1)))
    other = replace(config, run_dir=run_dir, tuning=replace(config.tuning, method="lora"))
    with pytest.raises(CheckpointError, match=r"tuning\.method was 'full' and is 'lora'"):
        prepared(other)


def test_what_does_not_fit_is_named_before_anything_is_trained(folder, tmp_path):
    config = small_tuning(folder, run_dir=str(tmp_path / "run"))
    wrong = replace(config, model=replace(config.model, hidden_size=64, intermediate_size=50))
    with pytest.raises(ConfigError) as caught:
        prepared(wrong)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.hidden_size is 64",
        "model.intermediate_size is 50",
    ]
    small = write_base(tmp_path / "small", vocab_size=tokenizer().vocab_size - 7)
    with pytest.raises(ConfigError, match="they do not belong together"):
        prepared(small_tuning(tmp_path, {"base": str(small), "data": [str(folder / "chats.jsonl")]}))
    with pytest.raises(DataError, match=r"tuning.validation_share to 0"):
        one = write_lines(tmp_path / "one.jsonl", conversations(1))
        prepared(replace(config, tuning=replace(config.tuning, data=[str(one)])))
    with pytest.raises(ConfigError, match=r"tuning.template is 'nowhere'"):
        prepared(replace(config, tuning=replace(config.tuning, template="nowhere")))
    with pytest.raises(ConfigError, match="prompt_style is append"):
        adapter = replace(config.tuning.adapter, method="prompt", prompt_style="append")
        prepared(replace(config, tuning=replace(config.tuning, method="prompt", adapter=adapter)))


def test_a_base_with_holes_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(folder / "base", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    data = [str(folder / "chats.jsonl")]
    config = prepared(small_tuning(tmp_path, {"data": data}))
    with pytest.raises(CheckpointError, match=r"head.norm.weight holds NaN"):
        tune_here(config)


def test_the_verb_takes_model_and_data_and_fills_in_the_rest(folder, tmp_path, capsys, monkeypatch):
    from mtnlg.cli.main import main

    monkeypatch.chdir(tmp_path)
    arguments = ["tune", str(folder / "base"), str(folder / "chats.jsonl"), "--epochs", "1"]
    arguments += ["--data.sequence_length", "48", "--training.num_threads", "1"]
    assert main([*arguments, "--method=lora", "--prepare"]) == 0
    text = capsys.readouterr().out
    assert "training: 23 examples" in text and "runs/base-lora is prepared" in text
    saved = json.dumps(__import__("yaml").safe_load(Path("runs/base-lora/config.yaml").read_text()))
    assert '"hidden_size": 32' in saved and '"method": "lora"' in saved
    for name, setting in (("dora", "decomposed: true"), ("rslora", "rank_stabilized: true")):
        assert main([*arguments, "--method", name, "--learning-rate=0.5", "--print-config"]) == 0
        text = capsys.readouterr().out
        assert f"{setting}\n" in text and "method: lora\n" in text and "learning_rate: 0.5\n" in text
    assert main([*arguments, "--method=qlora", "--print-config"]) == 0
    assert "weights: int4\n" in capsys.readouterr().out
    assert main([*arguments, "--method", "loar"]) == 2
    assert "tuning.method is 'loar': choose one of full, lora" in capsys.readouterr().err
    assert main(["tune", str(folder / "nothing"), "x.jsonl"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["train", "runs/base-lora/config.yaml"]) == 0
    text = capsys.readouterr().out
    assert "; before tuning it was" in text and "mtnlg chat runs/base-lora" in text

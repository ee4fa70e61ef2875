"""Encoder-decoders tuned on conversations: what is read and written, in any layout, resumed, as a MODEL."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parallel.parity import T5
from tests.training.helpers import Recorder
from tests.tuning.helpers import (
    conversations,
    prepared,
    small_tuning,
    tokenizer,
    tune_here,
    tune_laid_out,
    write_lines,
)
from tests.tuning.test_tune import copy_of

from mtnlg import MegatronEncoderDecoderModel
from mtnlg.config import ConfigError, DataError, LayoutConfig, MegatronModelConfig, StopConfig
from mtnlg.generation.dialogue_format import choose_format, dialogue_prompt
from mtnlg.tokens.t5_tokenizer import T5Tokenizer
from mtnlg.tuning import Tuning
from mtnlg.tuning.conversations import Conversation
from mtnlg.tuning.pairs import PairRenderer
from mtnlg.tuning.templates import with_template

TALK = [
    {"role": "system", "content": "be red"},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "two one"},
    {"role": "user", "content": "cat dog"},
    {"role": "assistant", "content": "dog cat"},
]


def reader() -> T5Tokenizer:
    plain = tokenizer()
    return T5Tokenizer(plain.definition, {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"})


def write_base(folder: Path) -> None:
    text = reader()
    ends = dict(eos_token_id=text.end_of_text_id, pad_token_id=text.padding_id)
    fields = {**T5, "vocab_size": text.vocab_size, **ends, "decoder_start_token_id": text.padding_id}
    MegatronEncoderDecoderModel(MegatronModelConfig(**fields), text).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    write_base(path / "base")
    return path


def made(folder, name, tuning=None, **sections):
    return prepared(small_tuning(folder, tuning or {}, run_dir=str(folder / name), **sections))


def rendered(conversation, **options):
    values = {"loss_on": "assistant", "max_source": 99, "max_target": 99, **options}
    renderer = PairRenderer(with_template(reader(), None), **values)
    text = renderer.tokenizer
    found = []
    for example in renderer.examples(conversation):
        cut = example.scored.index(True)
        assert not any(example.scored[:cut]) and all(example.scored[cut:])
        parts = example.ids[:cut], example.ids[cut:]
        found.append(tuple(text.decode(part, skip_special_tokens=False) for part in parts))
    return found, renderer


END = "<|endoftext|>"


def test_every_answer_is_written_after_all_that_was_said_before_it():
    first = (f"be red\n\none two{END}", f"two one{END}")
    second = f"be red\n\nUser: one two\nAssistant: two one\nUser: cat dog{END}"
    assert rendered(Conversation(TALK, "x"))[0] == [first, (second, f"dog cat{END}")]
    assert rendered(Conversation(TALK, "x"), loss_on="last")[0] == [(second, f"dog cat{END}")]
    plain = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    found = rendered(Conversation(plain, "x", is_plain=True), around=("a ", " b"))[0]
    assert found == [(f"a red b{END}", f"blue{END}")]
    asked = dialogue_prompt(reader(), TALK[:4], form=choose_format(reader()))
    assert reader().decode(asked.ids, skip_special_tokens=False) == second
    assert asked.end_ids == (reader().end_of_text_id,) and asked.stop == ()
    with pytest.raises(ConfigError, match="begins every answer anew"):
        dialogue_prompt(reader(), TALK[:3], form=choose_format(reader()), is_open=True)


def test_what_is_too_long_loses_its_oldest_turns_and_then_its_end():
    long = len(reader().encode("be red\n\nUser: one two\nAssistant: two one\nUser: cat dog"))
    found, renderer = rendered(Conversation(TALK, "x"), loss_on="last", max_source=long - 1)
    assert found == [(f"be red\n\ncat dog{END}", f"dog cat{END}")] and renderer.num_cut == 1
    found, renderer = rendered(Conversation(TALK, "x"), loss_on="last", max_source=4, max_target=2)
    source, target = (reader().encode(text)[:-1] for text in found[0])
    assert len(source) == 4 and source[-1] == reader().end_of_text_id and len(target) == 2
    options = dict(loss_on="last", max_target=1, too_long="leave_out")
    assert rendered(Conversation(TALK, "x"), **options)[1].num_left_out == 1
    with pytest.raises(DataError, match=r"line 3: .* to write, and there is room for 99 and 1"):
        rendered(Conversation(TALK, "f, line 3"), max_target=1, too_long="refuse")
    with pytest.raises(DataError, match="calls tools"):
        rendered(Conversation(TALK, "x", tools=[{"type": "function"}]))


def loss_of(model, batch):
    with torch.no_grad():
        output = model(
            batch.input_ids, batch.decoder_input_ids, batch.labels, batch.encoder_mask, None,
            batch.document_ids, batch.decoder_document_ids,
        )  # fmt: skip
    return float(output.loss) / batch.num_valid_tokens


def test_packing_changes_no_loss_and_loses_no_answer(folder):
    model = MegatronEncoderDecoderModel.from_pretrained(folder / "base")
    losses, answers = [], []
    for packing in (True, False):
        config = made(folder, f"packing-{packing}", {"packing": packing})
        assert config.data.objective.target_length % 8 == 0
        stream = Tuning().validation_stream(config, None)
        batch = stream.batch(0, stream.num_samples + 2)  # rows past the end have nothing
        losses.append(loss_of(model, batch))
        answers.append(sorted(batch.labels[batch.labels != -100].tolist()))
        assert (batch.document_ids is not None) is packing
        halves = [stream.batch(0, 4, replica, 2) for replica in range(2)]
        whole = stream.batch(0, 4)
        assert torch.equal(torch.cat([half.labels for half in halves]), whole.labels)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert answers[0] == answers[1] and np.isfinite(losses[0])


LAYOUTS = {
    "tp2": ({"tensor_parallel_size": 2}, {}),
    "dp2 zero3": ({"data_parallel_size": 2, "data_parallel_sharding": "zero3"}, {}),
    "pp2": ({"pipeline_parallel_size": 2}, {"method": "lora"}),
    "tp2 pp2": (
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"method": "prompt", "packing": False},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_trains_the_same_run(folder, ranks, name):
    layout, tuning = LAYOUTS[name]
    config = made(folder, f"one-{name.replace(' ', '-')}", tuning, stop=StopConfig(steps=2))
    recorder = Recorder()
    laid_out = LayoutConfig(**{"data_parallel_size": 1, **layout})
    run_dir = copy_of(config, folder / f"laid-{name.replace(' ', '-')}")
    found = ranks.run(laid_out.num_ranks, tune_laid_out, replace(config, layout=laid_out, run_dir=run_dir))
    tune_here(config, recorder)
    assert found[0]["losses"] == pytest.approx(recorder.losses, rel=2e-5)
    assert len(recorder.losses) == 2


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_a_run_goes_on_where_it_was_and_is_a_model(folder, method):
    config = made(folder, f"run-{method}", {"method": method, "packing": method != "prompt"})
    whole, first, second = Recorder(), Recorder(), Recorder()
    tune_here(replace(config, run_dir=copy_of(config, folder / f"whole-{method}")), whole)
    tune_here(replace(config, stop=StopConfig(steps=4)), first)
    result = tune_here(config, second)
    assert first.losses | second.losses == whole.losses and sorted(second.losses) == [5, 6]
    assert method == "prompt" or whole.losses[6] < whole.losses[1]
    stream = Tuning().validation_stream(config, None)
    batch = stream.batch(0, stream.num_samples)
    for path in [config.run_dir] + [f"{config.run_dir}/adapter"] * (method != "full"):
        model = MegatronEncoderDecoderModel.from_pretrained(path)
        assert model.tokenizer.chat_template is not None and model.tokenizer.ends_texts
        assert loss_of(model, batch) == pytest.approx(result.validation_loss, rel=1e-5)
        ids = reader().encode("one two")
        said = model.generate(ids, max_new_tokens=4)
        first = model.config.vocab_size
        read = [[*range(first, first + 20 * (method == "prompt")), *ids]]
        expected = [model.config.decoder_start_token_id]
        memory = model.encode(torch.tensor(read))
        while len(expected) < len(said):
            hidden = model.decode(torch.tensor([expected]), memory, None)
            expected.append(int(model.head(hidden).logits[0, -1].argmax()))
        assert said == expected


def test_a_student_learns_from_a_teacher_of_its_kind(folder):
    plain, taught = Recorder(), Recorder()
    config = made(folder, "student", {"distillation": None}, stop=StopConfig(steps=1))
    tune_here(config, plain)
    from mtnlg.config import DistillationConfig

    teacher = DistillationConfig(str(folder / "base"), share=0.5, temperature=1.0)
    config = made(folder, "taught", {"distillation": teacher}, stop=StopConfig(steps=1))
    tune_here(config, taught)  # of itself: no divergence, half of the cross entropy
    assert taught.losses[1] == pytest.approx(plain.losses[1] / 2, rel=1e-5)


def test_what_an_encoder_decoder_cannot_is_refused(folder):
    for tuning, said in (
        ({"loss_on": "all"}, "what an encoder reads is not predicted"),
        ({"method": "prompt"}, "would see other examples; set it to false"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(folder, "refused", tuning)
    with pytest.raises(ConfigError, match="method is prefix: an encoder-decoder has virtual tokens before"):
        small_tuning(folder, {"method": "prefix"})
    lines = write_lines(folder / "few.jsonl", conversations(4))
    with pytest.raises(ConfigError, match=r"target_length is 9: with layout.sequence_parallel"):
        config = small_tuning(folder, {"data": [str(lines)]}, run_dir=str(folder / "nine"))
        objective = replace(config.data.objective, target_length=9)
        layout = LayoutConfig(tensor_parallel_size=2, data_parallel_size=1)
        replace(config, data=replace(config.data, objective=objective), layout=layout)

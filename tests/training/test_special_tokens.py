"""Ids of special tokens that an objective needs, and runs that learn by one."""

from dataclasses import replace

import pytest
from tests.tokens.texts import TEXTS
from tests.training.helpers import Recorder, small_config, train_here

from mtnlg.config import ConfigError, DataConfig, MegatronModelConfig, SourceEntry, TokenizerConfig
from mtnlg.config.objective import ObjectiveConfig
from mtnlg.tokens.tokenizer import Tokenizer
from mtnlg.training.prepare import prepare
from mtnlg.training.special_tokens import tokens_to_learn, with_special_tokens

T5 = dict(
    architecture="encoder_decoder", vocab_size=37, hidden_size=8, num_hidden_layers=1,
    num_attention_heads=2, position_embedding="relative", normalization="rmsnorm",
    activation_function="geglu",
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
IDS = dict(sentinel_ids="36-30", end_id=1, padding_id=0)


def run_on_text(folder, objective, **model):
    (folder / "text.txt").write_text("\n\n".join(TEXTS * 20), encoding="utf-8")
    config = small_config(folder)
    sources = [SourceEntry(str(folder / "text.txt"))]
    data = DataConfig(sources=sources, objective=objective, sequence_length=16, split="8,2,0")
    tokenizer = TokenizerConfig(vocab_size=600, sets_vocab_size=True)
    return replace(config, data=data, tokenizer=tokenizer, model=replace(config.model, **model))


def test_a_trained_tokenizer_has_sentinels_and_modes(tmp_path):
    """data.objective.end_id, padding_id, start_id, sentinel_ids and mode_ids are the tokenizer's."""
    made = prepare(run_on_text(tmp_path, ObjectiveConfig("ul2")))
    objective, tokenizer = made.data.objective, Tokenizer.from_pretrained(made.tokenizer.path)
    names = [tokenizer.decode([index], skip_special_tokens=False) for index in objective.sentinels()]
    assert names == [f"<extra_id_{number}>" for number in range(100)]
    assert set(objective.mode_ids) == {"[NLU]", "[S2S]", "[NLG]"}
    assert (objective.end_id, objective.padding_id) == (tokenizer.end_of_text_id, tokenizer.padding_id)
    assert prepare(made) == made
    assert tokens_to_learn(run_on_text(tmp_path, ObjectiveConfig())) == []


def test_an_encoder_decoder_takes_the_ends_of_its_tokenizer(tmp_path):
    config = run_on_text(tmp_path, ObjectiveConfig("span_corruption"))
    config = replace(config, model=MegatronModelConfig(**T5))
    tokenizer = Tokenizer.train(TEXTS, 600, more_special_tokens=tokens_to_learn(config))
    found = with_special_tokens(config, tokenizer)
    end, padding = tokenizer.end_of_text_id, tokenizer.padding_id
    assert (found.model.eos_token_id, found.model.pad_token_id) == (end, padding)
    assert found.model.decoder_start_token_id == found.data.objective.start_id == padding
    own = replace(config, tokenizer=TokenizerConfig(), model=replace(config.model, eos_token_id=5))
    assert with_special_tokens(own, tokenizer).data.objective.end_id == 5


def test_a_tokenizer_without_them_is_refused_with_a_way_out(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 400)
    for objective, message in (
        (ObjectiveConfig("span_corruption"), r"no sentinels <extra_id_0>.*choose data\.objective\.name"),
        (ObjectiveConfig("ul2", denoisers=["prefix 0.5 [X]"]), r"no token \[X\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_special_tokens(run_on_text(tmp_path, objective), tokenizer)
    given = ObjectiveConfig("ul2", denoisers=["prefix 0.5 [X]"], mode_ids={"[X]": 7})
    assert with_special_tokens(run_on_text(tmp_path, given), tokenizer).data.objective.mode_ids == {
        "[X]": 7
    }


@pytest.mark.parametrize("name", ["prefix_lm", "span_corruption"])
def test_a_decoder_learns_by_an_objective_and_goes_on(tmp_path, name):
    objective = ObjectiveConfig(name, **IDS)
    config = small_config(tmp_path)
    config = replace(config, data=replace(config.data, objective=objective))
    whole = Recorder()
    train_here(config, whole)
    again = replace(config, run_dir=str(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    for steps in (3, 6):
        parts = Recorder()
        train_here(replace(again, stop=replace(again.stop, steps=steps)), parts)
    assert [step.loss for step in parts.steps] == [step.loss for step in whole.steps[3:]]
    assert len({step.loss for step in whole.steps}) == 6

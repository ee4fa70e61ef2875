import pytest
import yaml

from mtnlg.config import ConfigError, RunConfig, SourceEntry, StopConfig
from mtnlg.config.load import load_run_config, save_run_config


def problems_of(*overrides, recipe=None):
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, overrides)
    return caught.value.problems


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_recipe_the_defaults_hold():
    config = load_run_config()
    expected = RunConfig()
    expected.tokenizer.sets_vocab_size = True
    expected.model.vocab_size = 8192
    assert config == expected


def test_both_spellings_of_an_override_and_dashes_mean_the_same():
    spelled = [
        ["--batch.micro_batch_size=4"],
        ["--batch.micro_batch_size", "4"],
        ["--batch.micro-batch-size=4"],
        ["batch.micro_batch_size=4"],
    ]
    assert [load_run_config(None, form).batch.micro_batch_size for form in spelled] == [4, 4, 4, 4]


def test_an_override_wins_over_the_recipe_and_the_last_one_wins(tmp_path):
    recipe = write(tmp_path, "seed: 1\nbatch: {global_batch_size: 16}\n")
    config = load_run_config(recipe, ["--seed=2", "--seed=3"])
    assert (config.seed, config.batch.global_batch_size) == (3, 16)


@pytest.mark.parametrize("text", ["1e9", "1000000000", "1_000_000_000", "1.0e9"])
def test_numbers_may_be_written_in_every_usual_way(tmp_path, text):
    assert load_run_config(None, [f"--stop.tokens={text}"]).stop.tokens == 1_000_000_000
    assert load_run_config(write(tmp_path, f"stop: {{tokens: {text}}}")).stop.tokens == 1_000_000_000
    assert load_run_config(None, ["--optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_text_settings_keep_what_was_typed():
    config = load_run_config(None, ["--run_dir=007", "--evaluation.prompts", "a: b"])
    assert (config.run_dir, config.evaluation.prompts) == ("007", ["a: b"])


def test_a_section_that_is_given_replaces_its_default():
    assert load_run_config(None, ["--stop.minutes=3"]).stop == StopConfig(minutes=3)


def test_sources_may_be_plain_paths():
    config = load_run_config(None, ["--data.sources=[a.txt, {path: b.jsonl, text_key: body}]"])
    assert config.data.sources == [SourceEntry("a.txt"), SourceEntry("b.jsonl", text_key="body")]


def test_preset_expands_and_written_fields_win():
    config = load_run_config(None, ["--preset=gpt2-medium", "--model.num_hidden_layers=3"])
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (1024, 3)


@pytest.mark.parametrize("written", ["", "model: {vocab_size: null}", "preset: gpt2"])
def test_an_open_vocab_size_is_the_tokenizers(tmp_path, written):
    config = load_run_config(write(tmp_path, f"{written}\ntokenizer: {{vocab_size: 512}}\n"))
    assert config.tokenizer.sets_vocab_size
    assert config.model.vocab_size == 512


def test_a_written_vocab_size_stays():
    config = load_run_config(None, ["--model.vocab_size=51200", "--tokenizer.vocab_size=512"])
    assert config.model.vocab_size == 51200
    assert not config.tokenizer.sets_vocab_size


@pytest.mark.parametrize("preset", ["tiny-5m", "mt-nlg-530b", "llama3-8b"])
def test_a_saved_config_loads_to_an_equal_one(tmp_path, preset):
    overrides = [
        f"--preset={preset}",
        "--data.sources=[{path: 诗/*.jsonl, weight: 2}]",
        "--evaluation.prompts=[秋天的夜晚, '1', 'null']",
        "--optimizer.epsilon=1e-12",
        "--stop.minutes=0.5",
    ]
    config = load_run_config(None, overrides)
    save_run_config(config, tmp_path / "deep" / "config.yaml")
    assert load_run_config(tmp_path / "deep" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]


def test_every_problem_is_named_at_once_with_its_place(tmp_path):
    recipe = write(
        tmp_path,
        "preset: tiny-5m\n"
        "model:\n"
        "  hiden_size: 64\n"
        "  num_attention_heads: seven\n"
        "optimiser: {name: muon}\n"
        "data:\n"
        "  split: 98,1\n"
        "  sources: [{path: a.txt, wieght: 3}]\n"
        "stop: {steps: true}\n",
    )
    problems = problems_of("--optimizer.lerning_rate=1", "--schedule.name=cosin", recipe=recipe)
    text = "\n".join(problems)
    for part in (
        f"model.hiden_size is not a setting: did you mean model.hidden_size? ({recipe}, line 3)",
        f"model.num_attention_heads is 'seven': expected a whole number. ({recipe}, line 4)",
        "optimiser is not a setting: did you mean optimizer?",
        "data.sources[0].wieght is not a setting: did you mean weight?",
        "stop.steps is true: expected a whole number or null.",
        "did you mean optimizer.learning_rate",
        "data.split is '98,1'",
        "schedule.name is 'cosin': choose one of",
    ):
        assert part in text
    assert len(problems) == 8 + 1  # and stop without anything right in it


def test_a_setting_in_the_wrong_section_is_pointed_to_the_right_one():
    assert "did you mean optimizer.learning_rate?" in problems_of("--learning_rate=1")[0]


def test_rules_across_sections_are_found_beside_range_problems():
    text = "\n".join(
        problems_of("--batch.global_batch_size=7", "--layout.tensor_parallel_size=5", "--data.split=1,1")
    )
    assert "batch.global_batch_size is 7" in text
    assert "it must divide model.num_attention_heads (12)" in text
    assert "data.split" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model=3", "expected settings such as"),
        ("--seed=[1", "cannot be read as a YAML value"),
        ("--seed=1.5", "expected a whole number"),
        ("--seed=null", "expected a whole number"),
        ("--training.compile=1", "expected true or false"),
        ("--optimizer.learning_rate=.inf", "expected a finite number"),
        ("--batch.micro_batch_size=0", "must be greater than 0"),
        ("--preset=tiny-5k", "did you mean tiny-5m"),
        ("--data.sources={weight: 1}", "path is missing"),
        ("--data.sources=3", "expected a list"),
        ("--layout.backend=mpi", "choose one of nccl, gloo"),
        ("--seed", "its value is missing"),
        ("seed", "expected --section.setting=value"),
    ],
)
def test_wrong_values_are_explained(override, message):
    assert message in "\n".join(problems_of(override))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", "not valid YAML"),
        ("- a\n- b\n", "expected settings such as"),
        ("seed: 1\nmodel: {hidden_size: 64}\nseed: 2\n", "line 3: seed is given twice (also in line 1)"),
        ("model:\n\thidden_size: 3\n", "line 2"),
        ("seed: 1\nrun_dir: a\x1fb\n", "line 2: the character U+001F"),
        ("run_dir: 2024-13-45\n", "not valid YAML"),
        ("model: &again {preset: *again}\n", "not"),
        ("[1]: 2\n", "not"),
        ("model: {hidden_size: 2024-01-01}\n", "expected a whole number"),
    ],
)
def test_broken_recipes_are_refused_with_the_line(tmp_path, text, message):
    assert message in "\n".join(problems_of(recipe=write(tmp_path, text)))


def test_a_recipe_with_another_encoding_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("run_dir: 秋天".encode("gbk"))
    assert "not UTF-8 at byte 9" in problems_of(recipe=path)[0]


def test_a_missing_recipe_suggests_its_neighbour(tmp_path):
    write(tmp_path, "seed: 1")
    assert "did you mean" in problems_of(recipe=tmp_path / "recipes.yaml")[0]
    assert "does not exist" in problems_of(recipe="nowhere/at/all.yaml")[0]


def test_an_empty_recipe_is_the_defaults(tmp_path):
    assert load_run_config(write(tmp_path, "# nothing\n")) == load_run_config()


def test_virtual_tokens_take_positions_from_samples():
    problems = problems_of("--model.prompt_tuning=true")
    assert any("20 virtual tokens a sample has" in problem for problem in problems)
    config = load_run_config(None, ["--model.prompt_tuning=true", "--data.sequence_length=1004"])
    assert config.adapter is not None and config.adapter.num_virtual_tokens == 20


def test_the_saved_file_is_plain_yaml(tmp_path):
    save_run_config(load_run_config(), tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"]["beta2"] == 0.95

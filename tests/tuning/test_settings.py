"""No setting of tuning is silently ignored: for each, the test that shows what it does."""

import ast
from pathlib import Path

import pytest

from mtnlg.config import ConfigError, DistillationConfig, RunConfig, TuningConfig
from mtnlg.config.check import setting_names
from mtnlg.config.load import dump_run_config, load_run_config
from mtnlg.tuning.defaults import default_rate

TESTS = Path(__file__).resolve().parents[1]
CHATS, RENDERING = "tuning/test_conversations.py", "tuning/test_rendering.py"
STREAM, TUNE, DISTILLATION = (f"tuning/test_{name}.py" for name in ("stream", "tune", "distillation"))
PROVED_BY = {
    "base": f"{TUNE}::test_what_does_not_fit_is_named_before_anything_is_trained",
    "method": f"{TUNE}::test_an_interrupted_run_goes_on_where_it_was",
    "data": f"{TUNE}::test_data_is_read_once_and_must_not_change_under_a_run",
    "validation_data": "tuning/test_settings.py::test_a_section_of_a_recipe_is_read_and_written",
    "validation_share": f"{TUNE}::test_the_tuned_run_is_a_model_that_answers",
    "format": f"{CHATS}::test_every_form_says_the_same",
    "template": f"{RENDERING}::test_answers_are_scored_after_the_prompts_that_models_are_asked_with",
    "system": f"{CHATS}::test_parts_of_a_record_are_kept",
    "loss_on": f"{RENDERING}::test_loss_on_says_what_is_scored",
    "max_turns": f"{CHATS}::test_long_dialogues_become_parts_that_end_with_an_answer",
    "too_long": f"{RENDERING}::test_what_is_too_long_loses_turns_then_the_end_of_its_only_answer",
    "packing": f"{TUNE}::test_packing_changes_no_loss",
    "epochs": f"{TUNE}::test_the_tuned_run_is_a_model_that_answers",
    "distillation.teacher": f"{DISTILLATION}::test_what_cannot_learn_from_a_teacher_is_refused",
    "distillation.share": f"{DISTILLATION}::test_the_formula_and_its_gradient",
    "distillation.temperature": f"{DISTILLATION}::test_the_formula_and_its_gradient",
}


def test_every_setting_has_its_proof():
    """An adapter's are shown by the tests of adapters."""
    names = {
        name.removeprefix("tuning.") for name in setting_names(RunConfig) if name.startswith("tuning.")
    }
    assert {name for name in names if not name.startswith("adapter.")} == set(PROVED_BY)
    for place in PROVED_BY.values():
        path, name = place.split("::")
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_small_models_move_faster_unless_the_rate_is_said():
    assert default_rate("full", 7_000_000_000) == 5e-5 and default_rate("lora", 10**9) == 2e-4
    assert default_rate("full", 10_000_000) == 5e-4 and default_rate("lora", 10_000) == 20 * 2e-4
    assert default_rate("prompt", 10_000_000) == default_rate("prompt", 10**10) == 3e-2


def test_a_section_of_a_recipe_is_read_and_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "tuning:\n  base: runs/x\n  data: [a.jsonl]\n  validation_data: [b.jsonl]\n"
        "  adapter: {rank: 4}\n  distillation: {teacher: runs/y}\n"
    )
    config = load_run_config(recipe, ["--tuning.method=lora", "--tuning.distillation.share=0.2"])
    assert config.tuning.adapter.rank == 4 and config.tuning.adapter.method == "lora"
    assert config.tuning.distillation == DistillationConfig("runs/y", 0.2)
    assert config.tuning.validation_data == ["b.jsonl"]
    recipe.write_text(dump_run_config(config))
    assert load_run_config(recipe) == config
    assert load_run_config(recipe, ["--tuning.distillation=null"]).tuning.distillation is None


def test_what_is_wrong_is_named_with_its_place(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tuning:\n  base: runs/x\n  data: [a]\n  adapter: {rank: 0}\n  methd: lora\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe)
    text = "\n".join(caught.value.problems)
    assert "tuning.adapter.rank is 0" in text and "line 4" in text
    assert "tuning.methd is not a setting: did you mean tuning.method?" in text
    with pytest.raises(ConfigError) as caught:
        TuningConfig(format="csv", loss_on="user", epochs=0.0, max_turns=1, validation_share=1.0)
    assert len(caught.value.problems) == 7
    with pytest.raises(ConfigError) as caught:
        DistillationConfig(share=0.0, temperature=0.0)
    assert len(caught.value.problems) == 3

"""The recipes are complete and right as they stand."""

from pathlib import Path

import pytest

from mtnlg.config.load import load_run_config

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_loads_and_says_how_to_use_it(path):
    config = load_run_config(path)
    assert config.run_dir != "runs/run"
    assert path.read_text("utf-8").startswith("# ")


def test_the_530b_recipe_is_the_model_of_the_paper():
    config = load_run_config(next(path for path in RECIPES if path.stem == "mt-nlg-530b"))
    assert round(config.model.num_parameters / 1e9, 1) == 529.6
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    assert config.optimizer.clip_grad_norm == 1.0
    assert (config.layout.tensor_parallel_size, config.layout.pipeline_parallel_size) == (8, 35)
    assert (config.batch.ramp_start, config.batch.global_batch_size) == (32, 1920)

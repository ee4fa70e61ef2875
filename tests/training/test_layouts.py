"""Checkpoints know no layout: each continues in any other, and all layouts train the same run."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from tests.training.helpers import load_and_save, small_config, train_laid_out, train_with_full_disk

from mtnlg.config import LayoutConfig, OptimizerConfig, StopConfig

LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2xdp2": {"tensor": 2, "data": 2},
    "pp2xdp2": {"pipeline": 2, "data": 2},
    "cp2": {"context": 2},
}
KINDS = {
    "dp2 zero3": {"data": 2, "data_parallel_sharding": "zero3"},
    "pp2 dualpipev": {"pipeline": 2, "pipeline_schedule": "dualpipev", "pipeline_layout": "Et|t|t|L"},
}


def layout(name: str) -> LayoutConfig:
    fields = {**LAYOUTS, **KINDS}[name]
    sizes = {
        f"{key}_parallel_size": fields.get(key, 1) for key in ("tensor", "pipeline", "data", "context")
    }
    return LayoutConfig(**sizes, **{key: value for key, value in fields.items() if "_" in key})


def run(ranks, config, name: str, steps: int) -> dict:
    config = replace(config, layout=layout(name), stop=StopConfig(steps=steps))
    return ranks.run(config.layout.num_ranks, train_laid_out, config)[0]


@pytest.fixture(scope="module")
def references(ranks, tmp_path_factory):
    """For an optimizer's name: the config of a run of one process with all its checkpoints, its losses."""

    @cache
    def make(optimizer: str):
        config = small_config(
            tmp_path_factory.mktemp(optimizer),
            optimizer=OptimizerConfig(name=optimizer, learning_rate=3e-3),
        )
        config = replace(config, model=replace(config.model, hidden_dropout=0.0))
        return config, run(ranks, config, "one", 6)["losses"]

    return make


def continue_from(config, folder, step: int):
    """A copy of the run in ``folder`` that holds only the checkpoint of ``step``."""
    shutil.copytree(config.run_dir, folder / "run")
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)
    return replace(config, run_dir=str(folder / "run"))


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        *(("adamw", name) for name in {**LAYOUTS, **KINDS} if name != "one"),
        ("muon", "tp2xdp2"),
        ("muon", "pp2xdp2"),
    ],
)
def test_layout_continues_one_process_and_back(references, ranks, tmp_path, optimizer, name):
    config, losses = references(optimizer)
    config = continue_from(config, tmp_path, 2)
    there = run(ranks, config, name, 4)
    assert sorted(there["losses"]) == [3, 4]
    back = run(ranks, config, "one", 6)
    for step, loss in {**there["losses"], **back["losses"]}.items():
        assert loss == pytest.approx(losses[step], rel=2e-5), step


def tensors_of(run_dir) -> dict:
    """All tensors of the checkpoint of step 6, put together from their shards."""
    parts: dict = {}
    for path in (run_dir / "checkpoints" / "step-00000006").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                key = (path.parent.name, name)
                parts.setdefault(key, {})[tuple(offsets[name]["saved_offsets"])] = file.get_tensor(name)
    return {key: join(shards) for key, shards in parts.items()}


def join(shards: dict) -> torch.Tensor:
    ends = [[o + n for o, n in zip(offset, part.shape)] for offset, part in shards.items()]
    whole = torch.full([max(end) for end in zip(*ends)], torch.nan)
    for offset, part in shards.items():
        whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape))] = part
    return whole


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resharding_changes_no_bit(references, ranks, tmp_path, optimizer):
    """A checkpoint that is loaded and saved by one layout after the other stays bit-equal."""
    config, _ = references(optimizer)
    run_dir = tmp_path / "start"
    shutil.copytree(config.run_dir, run_dir)
    before = tensors_of(run_dir)
    for number, name in enumerate(["tp2xpp2", "pp2xdp2", "tp2xdp2", "one"]):
        current = replace(config, run_dir=str(run_dir), layout=layout(name))
        run_dir = tmp_path / f"{number}-{name}"
        run_dir.mkdir()
        ranks.run(current.layout.num_ranks, load_and_save, current, str(run_dir))
        after = tensors_of(run_dir)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before), name


def test_full_disk_of_one_rank_is_an_error_on_all_and_no_checkpoint(ranks, tmp_path):
    config = small_config(tmp_path, layout=layout("pp2"))
    errors = ranks.run(2, train_with_full_disk, config, 1)
    assert all("the disk is full" in error for error in errors)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []

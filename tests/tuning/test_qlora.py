"""LoRA beside matrices of few bits: the numbers of one process in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import RankPool
from tests.training.helpers import Recorder
from tests.tuning.helpers import prepared, small_tuning, tune_here, tune_laid_out

from mtnlg import MegatronLmModel
from mtnlg.config import ConfigError, LayoutConfig
from mtnlg.parallel import build_mesh
from mtnlg.quantization import quantized_linears
from mtnlg.tuning import Tuning

INT4: dict[str, Any] = {"quantize": True, "quantize_config": {"weights": "int4"}}


def qlora(folder: Path, **sections: Any) -> Any:
    config = small_tuning(folder, {"method": "lora"}, **sections)
    return replace(config, model=replace(config.model, **INT4))


def test_quantized_weights_stay_and_updates_learn(tmp_path: Path) -> None:
    config = prepared(qlora(tmp_path))
    model = Tuning().lay_out(config, build_mesh(LayoutConfig(), "cpu"))
    Tuning().begin(config, model, resumes=False)
    linears = quantized_linears(model.decoder)
    assert len(linears) == 2 * 7
    base = MegatronLmModel.from_pretrained(config.tuning.base)
    for name, linear in linears.items():
        weight = base.get_submodule(name).weight
        assert float((linear.dequantize() - weight.detach()).abs().max()) <= 0.2 * float(
            weight.detach().abs().max()
        )
    assert not any("mlp.up.weight" in name for name, _ in model.named_parameters())
    recorder = Recorder()
    tune_here(config, recorder)
    assert recorder.losses[6] < recorder.losses[1]
    tuned = MegatronLmModel.from_pretrained(Path(config.run_dir) / "adapter")
    assert tuned.adapter is not None and torch.isfinite(tuned(torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["pipeline", "data"])
def test_layouts_train_the_same(tmp_path: Path, ranks: RankPool, sizes: tuple[int, int]) -> None:
    recorder = Recorder()
    tune_here(prepared(qlora(tmp_path)), recorder)
    data, pipeline = sizes
    layout = LayoutConfig(data_parallel_size=data, pipeline_parallel_size=pipeline)
    config = prepared(qlora(tmp_path, layout=layout, run_dir=str(tmp_path / "laid-out")))
    found = ranks.run(2, tune_laid_out, config)[0]["losses"]
    assert found == pytest.approx(recorder.losses, rel=1e-5)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantized weights below an adapter are not divided"):
        qlora(tmp_path, layout=LayoutConfig(tensor_parallel_size=2))

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
from mtnlg.config.adapter import AdapterConfig
from mtnlg.parallel import build_mesh
from mtnlg.quantization import quantized_linears
from mtnlg.tuning import Tuning

INT4: dict[str, Any] = {"quantize": True, "quantize_config": {"weights": "int4"}}


def qlora(folder: Path, adapter: dict[str, Any] | None = None, **sections: Any) -> Any:
    tuning = {"method": "lora"} | ({} if adapter is None else {"adapter": AdapterConfig(**adapter)})
    config = small_tuning(folder, tuning, **sections)
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


def test_layouts_train_the_same(tmp_path: Path, ranks: RankPool) -> None:
    recorder = Recorder()
    adapter = {"rank": 3, "target_modules": ["all-linear"], "decomposed": True}
    tune_here(prepared(qlora(tmp_path, adapter)), recorder)
    for number, (tensor, pipeline, data) in enumerate([(2, 2, 1), (1, 1, 2), (4, 1, 1)]):
        sizes = dict(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data)
        config = qlora(tmp_path, adapter, layout=LayoutConfig(**sizes), run_dir=str(tmp_path / str(number)))
        found = ranks.run(tensor * pipeline * data, tune_laid_out, prepared(config))[0]["losses"]
        assert found == pytest.approx(recorder.losses, rel=1e-5), sizes


def test_rounded_inputs_are_not_divided(tmp_path: Path) -> None:
    config = qlora(tmp_path)
    rounded = {**INT4["quantize_config"], "activations": "int8"}
    with pytest.raises(ConfigError, match="activations int8 rounds inputs"):
        replace(
            config,
            model=replace(config.model, quantize_config=rounded),
            layout=LayoutConfig(tensor_parallel_size=2),
        )

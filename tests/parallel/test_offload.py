"""Weights and optimizer state in the CPU's memory. That no number changes is in the parity cases."""

from __future__ import annotations

import pytest
import torch

from mtnlg.config import (
    ConfigError,
    LayoutConfig,
    MegatronModelConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from mtnlg.parallel import build_mesh, lay_out
from mtnlg.parallel.mesh import resolve_layout
from mtnlg.tokens.batch import Batch
from mtnlg.training.optimizers import Optimizer

MODEL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
)


def test_a_run_on_the_cpu_has_nothing_to_offload() -> None:
    with pytest.raises(ConfigError, match=r"in the CPU's memory already. Leave it out"):
        resolve_layout(LayoutConfig(cpu_offload=True), "cpu")
    with pytest.raises(ConfigError, match="cpu_offload"):
        build_mesh(LayoutConfig(cpu_offload=True, data_parallel_size=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_gpu_steps_on_the_cpu_as_it_would_itself(dtype: str, optimizer: str) -> None:
    losses = {}
    for offload in (False, True):
        mesh = build_mesh(LayoutConfig(cpu_offload=offload), "cuda")
        model = lay_out(MegatronModelConfig(**MODEL), mesh, precision=PrecisionConfig(dtype))
        config = OptimizerConfig(name=optimizer)
        steps = Optimizer(model.named_parameters(), config)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 61, (4, 17), generator=generator)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        losses[offload] = []
        for _ in range(5):
            losses[offload].append(float(model.forward_backward([batch, batch], 128.0)))
            steps.step(1.0, max(1.0, float(model.gradient_norm())))
            steps.zero_grad()
        for group in steps.groups:
            for tensor in (*group.parameters, *(item for kind in group.state.values() for item in kind)):
                assert tensor.device.type == ("cpu" if offload else "cuda")
    assert losses[True] == pytest.approx(losses[False], rel=1e-2 if dtype == "bf16" else 1e-4)
    assert losses[True][-1] < losses[True][0]

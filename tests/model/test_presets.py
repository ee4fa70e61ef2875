"""The predicted sizes are those of the models as built."""

from __future__ import annotations

import pytest
import torch

from mtnlg.config import PRESETS, MegatronModelConfig
from mtnlg.model import MegatronLmDecoder

PUBLISHED = {  # billions, to the digits given by the papers and model cards
    "gpt2": (0.124, 3),
    "gpt2-xl": (1.558, 3),
    "gpt3-175b": (175, 0),
    "megatron-1.7b": (1.7, 1),
    "megatron-145b": (146, 0),  # 145.6
    "mt-nlg-530b": (529.6, 1),
    "megatron-1t": (1008.0, 1),
    "llama2-7b": (6.74, 2),
    "llama2-70b": (68.98, 2),
    "llama3-8b": (8.03, 2),
    "llama3-70b": (70.55, 2),
    "qwen2.5-0.5b": (0.494, 3),
    "qwen2.5-7b": (7.62, 2),
    "mixtral-8x7b": (46.7, 1),
    "qwen3-30b-a3b": (30.5, 1),
}
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.3}


@pytest.mark.parametrize("name", PRESETS)
def test_the_predicted_count_is_the_built_models(name):
    config = MegatronModelConfig.from_preset(name)
    with torch.device("meta"):
        model = MegatronLmDecoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters
    layer = sum(parameter.numel() for parameter in model.layers["0"].parameters())
    assert layer == config.num_parameters_per_layer


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_the_published_one(name):
    billions, digits = PUBLISHED[name]
    assert round(MegatronModelConfig.from_preset(name).num_parameters / 1e9, digits) == billions


@pytest.mark.parametrize("name", ACTIVE)
def test_the_active_parameters_are_the_published_ones(name):
    active = MegatronModelConfig.from_preset(name).num_active_parameters / 1e9
    assert active == pytest.approx(ACTIVE[name], abs=0.06)


def test_a_million_to_a_trillion():
    counts = [MegatronModelConfig.from_preset(name).num_parameters for name in PRESETS]
    assert min(counts) < 2e6
    assert max(counts) > 1e12

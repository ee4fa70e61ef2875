"""The predicted sizes are those of the models as built."""

from __future__ import annotations

import pytest
import torch

from mtnlg.config import PRESETS, MegatronModelConfig
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder

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
    "t5-small": (0.0605, 4),  # 60.5 million
    "t5-base": (0.223, 3),
    "t5-v1.1-xl": (2.8, 1),
    "t5-v1.1-xxl": (11.1, 1),
    "mt5-small": (0.3, 1),
    "mt5-base": (0.58, 2),
    "mt5-xxl": (12.9, 1),
}
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.3}


@pytest.mark.parametrize("name", PRESETS)
def test_the_predicted_count_is_the_built_models(name):
    config = MegatronModelConfig.from_preset(name)
    with torch.device("meta"):
        has_encoder = config.architecture == "encoder_decoder"
        model = (MegatronEncoderDecoder if has_encoder else MegatronLmDecoder)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters
    layer = sum(parameter.numel() for parameter in model.layers[str(config.total_layers - 1)].parameters())
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

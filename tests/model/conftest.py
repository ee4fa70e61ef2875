from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mtnlg.config import MegatronModelConfig
from mtnlg.model import MegatronLmDecoder, initialize_weights


def make_config(**fields: Any) -> MegatronModelConfig:
    shape = dict(
        vocab_size=53,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        init_method_std=0.2,
    )
    return MegatronModelConfig(**{**shape, **fields})


@pytest.fixture
def config() -> Callable[..., MegatronModelConfig]:
    return make_config


@pytest.fixture
def make_model() -> Callable[..., MegatronLmDecoder]:
    def make(seed: int = 0, **fields: Any) -> MegatronLmDecoder:
        model = MegatronLmDecoder(make_config(**fields))
        initialize_weights(model, model.config, seed)
        return model

    return make

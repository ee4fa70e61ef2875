from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mtnlg.config import MegatronModelConfig
from mtnlg.model import MegatronLmDecoder, initialize_weights

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": dict(),
    "llama": dict(
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "no-positions": dict(position_embedding="none"),
}


@pytest.fixture
def make_model() -> Callable[..., MegatronLmDecoder]:
    def make(family: str = "gpt", **fields: Any) -> MegatronLmDecoder:
        shape = dict(
            vocab_size=67,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=48,
            init_method_std=0.3,  # far apart logits, so that a wrong mask changes the choice
        )
        config = MegatronModelConfig(**{**shape, **FAMILIES[family], **fields})
        model = MegatronLmDecoder(config)
        initialize_weights(model, config, seed=3)
        return model.eval()

    return make

"""The same weights in ``megatron-core``: an independent program gives the same loss and gradients."""

from importlib.util import find_spec
from typing import Any

import pytest
from tests.parallel import megatron_oracle
from tests.parallel.parity import BOUND, GPT, LLAMA
from tests.ranks import RankPool

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="pip install 'mtnlg[bench]'")
EVEN = {"vocab_size": 38, "num_hidden_layers": 2}  # Megatron divides a vocabulary evenly or not at all
GPT_MODEL = {**GPT, **EVEN}
LLAMA_MODEL = {**LLAMA, **EVEN, "qk_normalization": False, "tie_word_embeddings": False}


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("model", [GPT_MODEL, LLAMA_MODEL], ids=["gpt", "llama"])
def test_megatron_core_has_our_loss_and_gradients(
    ranks: RankPool, model: dict[str, Any], tensor_parallel_size: int
) -> None:
    for found in ranks.run(2, megatron_oracle.beside_megatron, model, tensor_parallel_size):
        assert found["compared"] == found["expected"], "every parameter has its counterpart"
        assert found["loss"] <= BOUND
        assert found["gradient"] <= BOUND


def test_rows_of_a_group_stand_together_in_megatrons_matrix() -> None:
    """Two key heads, two queries each, heads of one row: q0 q1 k0 v0, then q2 q3 k1 v1."""
    torch = pytest.importorskip("torch")
    from mtnlg.config import MegatronModelConfig

    config = MegatronModelConfig(
        hidden_size=4, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    names = ("query", "key", "value")
    rows = {"query": [0, 1, 2, 3], "key": [10, 11], "value": [20, 21]}
    ours = {f"layers.0.attention.{name}.bias": torch.tensor(rows[name]) for name in names}
    ours["layers.0.attention.output.bias"] = torch.zeros(4)
    theirs = megatron_oracle.in_megatron_order(ours, config)
    found = theirs["decoder.layers.0.self_attention.linear_qkv.bias"].tolist()
    assert found == [0, 1, 10, 20, 2, 3, 11, 21]

"""What tensor parallelism promises besides the parity of tests/parallel/cases/tensor.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parallel import tensor_workers, workers
from tests.parallel.parity import GPT, LLAMA, layout_fields
from tests.parallel.test_checkpoints import assert_bit_equal, merged
from tests.ranks import RankPool

DROPPING = {**GPT, "num_hidden_layers": 2, "hidden_dropout": 0.4, "attention_dropout": 0.4}
DROPPING |= {"hidden_size": 32, "num_attention_heads": 4}  # heads as wide as the sequence is long
TWO = layout_fields(2, 1, 1)
Masks = list[dict[str, list[Any]]]


def masks(ranks: RankPool, steps: list[int], switches: dict[str, Any], **layout: Any) -> list[Masks]:
    arguments = (DROPPING, {**TWO, **layout}, switches, steps)
    return ranks.run(2, tensor_workers.dropout_masks, *arguments)


def same(one: list[Any], other: list[Any]) -> bool:
    assert len(one) == len(other) > 0
    return all(np.array_equal(left, right) for left, right in zip(one, other))


def differs(one: list[Any], other: list[Any]) -> bool:
    assert len(one) == len(other) > 0
    return not any(np.array_equal(left, right) for left, right in zip(one, other))


def test_ranks_drop_the_same_where_they_hold_the_same(ranks: RankPool) -> None:
    (first,), (second,) = masks(ranks, [1], {}, sequence_parallel=False)
    assert same(first["embedding"], second["embedding"])
    assert same(first["hidden"], second["hidden"])
    assert all(0.2 < mask.mean() < 0.6 for mask in first["embedding"] + first["hidden"])
    assert differs(first["attention"], second["attention"]), "heads of different ranks are different heads"
    assert differs(first["attention"][:1], first["attention"][1:]), "and so are those of different layers"


def test_ranks_drop_different_elements_of_different_positions(ranks: RankPool) -> None:
    (first,), (second,) = masks(ranks, [1], {}, sequence_parallel=True)
    for name in ("embedding", "hidden", "attention"):
        assert differs(first[name], second[name])


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_step_drops_the_same_again_and_another_step_does_not(
    ranks: RankPool, sequence_parallel: bool
) -> None:
    for rank in masks(ranks, [3, 4, 3], {}, sequence_parallel=sequence_parallel):
        for name in ("embedding", "hidden", "attention"):
            assert same(rank[0][name], rank[2][name])
            assert differs(rank[0][name], rank[1][name])


@pytest.mark.parametrize("what", ["full", "selective"])
def test_recomputation_drops_the_same_again(ranks: RankPool, what: str) -> None:
    recomputed = masks(ranks, [1], {"activation_recomputation": what}, sequence_parallel=False)
    kept = masks(ranks, [1], {}, sequence_parallel=False)
    for (rank,), (plain,) in zip(recomputed, kept):
        assert same(rank["gradients"], plain["gradients"])
        if what == "full":
            passes, count = rank["attention"], len(plain["attention"])
            assert len(passes) == 2 * count, "computed a second time"
            assert same(passes[:count], plain["attention"])
            assert same(passes[count:], plain["attention"][::-1]), "from the last layer to the first"


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_output_biases_are_added_once(ranks: RankPool, sequence_parallel: bool) -> None:
    layout = {**TWO, "sequence_parallel": sequence_parallel}
    assert ranks.run(2, tensor_workers.bias_of_output, GPT, layout) == [2.0, 2.0]


def test_shared_key_and_value_heads_keep_their_whole_shape(ranks: RankPool) -> None:
    model = {**LLAMA, "num_key_value_heads": 1}
    for found in ranks.run(2, tensor_workers.shapes_of, model, TWO):
        assert found["layers.0.attention.key.weight"] == ((6, 24), 6 * 24, "(Replicate(),)")
        assert found["layers.0.attention.query.weight"] == ((24, 24), 12 * 24, "(Shard(dim=0),)")


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("fields", [GPT, LLAMA])
def test_logits_stay_split_unless_they_are_asked_for(
    ranks: RankPool, fields: dict[str, Any], gathers: bool
) -> None:
    model = {**fields, "parallel_output": not gathers}
    (expected,) = ranks.run(1, tensor_workers.logits_of, model, layout_fields(1, 1, 1))
    found = ranks.run(2, tensor_workers.logits_of, model, TWO)
    if not gathers:
        assert [part.shape[-1] for part in found] == [19, 18]
        found = [np.concatenate(found, axis=-1)]
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=2e-6 * np.abs(expected).max())


def test_shared_heads_continue_in_other_layouts_to_the_bit(ranks: RankPool, tmp_path: Path) -> None:
    model = {**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 8, "num_hidden_layers": 2}
    run = str(tmp_path)
    shared, alone = layout_fields(4, 1, 1), layout_fields(1, 1, 1)
    saved = merged(_continue(ranks, 4, model, shared, run, 0))
    assert saved["layers.0.attention.key.weight"].shape == (6, 24)
    assert_bit_equal(_continue(ranks, 1, model, alone, run, 1), saved)
    assert_bit_equal(_continue(ranks, 2, model, TWO, run, 1), saved)
    assert_bit_equal(_continue(ranks, 4, model, shared, run, 1), saved)


def _continue(
    ranks: RankPool, size: int, model: dict[str, Any], layout: dict[str, Any], run: str, step: int
) -> Any:
    return ranks.run(size, workers.continue_training, model, layout, {"name": "adamw"}, run, step, 1)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_the_compiler_takes_a_block_with_its_exchanges_as_one_graph(
    ranks: RankPool, sequence_parallel: bool
) -> None:
    layout = {**TWO, "sequence_parallel": sequence_parallel}
    assert max(ranks.run(2, tensor_workers.compiled_whole, LLAMA, layout)) <= 1e-6

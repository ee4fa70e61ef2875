"""Attention over parts of a sequence beside attention over all of it, and what it costs."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tests.parallel import context_workers as workers
from tests.ranks import RankPool
from tests.training.helpers import small_config, train_laid_out
from torch._subclasses.fake_tensor import FakeTensorMode

from mtnlg.config import EvaluationConfig, LayoutConfig, MegatronModelConfig, StopConfig
from mtnlg.parallel.attention_blocks import Visibility, attend, attend_backward, merge
from mtnlg.parallel.context_costs import context_costs, tokens_that_hide_messages
from mtnlg.parallel.ring_attention import Ring, chunks_of_rank

METHODS = ("ring", "all_to_all")
SHAPES = [  # sequence, heads, key/value heads, documents, side of a tile
    (16, 4, 4, False, 128),
    (48, 4, 2, True, 4),
    (40, 8, 1, True, 3),
    (64, 4, 1, False, 8),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("length", "heads", "key_values", "documents", "tile"), SHAPES)
def test_parts_attend_like_the_whole(
    ranks: RankPool,
    method: str,
    size: int,
    length: int,
    heads: int,
    key_values: int,
    documents: bool,
    tile: int,
) -> None:
    args = (method, length, heads, key_values, documents, "float64", tile)
    assert max(max(errors) for errors in ranks.run(size, workers.attention_errors, *args)) < 1e-13


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_parts_attend_in_every_dtype(ranks: RankPool, method: str, dtype: str, bound: float) -> None:
    for documents in (True, False):
        args = (method, 64, 12, 3, documents, dtype, 8)
        assert max(max(errors) for errors in ranks.run(4, workers.attention_errors, *args)) < bound


@pytest.mark.parametrize("method", METHODS)
def test_dropout_keeps_the_mean_and_draws_the_same_again_in_the_backward_pass(
    ranks: RankPool, method: str
) -> None:
    for found in ranks.run(2, workers.dropped_attention, method, 16, 200, 0.2):
        assert found["change"] == pytest.approx(found["difference"], rel=1e-5)
        assert found["differs"] > 0.2
        assert found["mean_error"] < 0.35


def test_every_token_is_on_one_rank_with_its_label_and_position(ranks: RankPool) -> None:
    for method in METHODS:
        found = ranks.run(4, workers.parts_of, method, 2, 24)
        for row in range(2):
            assert sorted(place for part in found for place in part["input_ids"][row]) == list(range(24))
        for part in found:
            assert part["position_ids"] == part["input_ids"]
            assert part["labels"] == [[place + 1 for place in row] for row in part["input_ids"]]
            assert part["document_ids"] == [[place // 3 for place in range(24)]] * 2  # of the whole


def test_ring_computes_what_causality_shows_and_no_more() -> None:
    size, length = 4, 32
    half = length // 2 // size
    places = [
        [c * half + i for c in chunks_of_rank(rank, size) for i in range(half)] for rank in range(size)
    ]
    for rank in range(size):
        ring = Ring()
        ring.rank, ring.size = rank, size
        for source in range(size):
            rows, keys = ring.meeting(source, 2 * half)
            met = {(query, key) for query in places[rank][rows] for key in places[source][keys]}
            if source == rank:
                assert places[rank] == sorted(places[rank]), "local order is the causal order"
                met = {pair for pair in met if pair[0] >= pair[1]}
            visible = {(query, key) for query in places[rank] for key in places[source] if query >= key}
            assert met == visible


def test_ranks_of_a_ring_have_equal_work_at_every_step(ranks: RankPool) -> None:
    pairs = ranks.run(4, workers.computed_pairs, 64, False)
    assert all(steps == pairs[0] for steps in pairs)
    assert sum(map(sum, pairs)) == 64 * 65 // 2, "all visible pairs, each once"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "heads", "key_values"), [(2, 4, 4), (4, 8, 2), (4, 4, 1)])
def test_formulas_are_what_is_kept_and_sent(
    ranks: RankPool, method: str, size: int, heads: int, key_values: int
) -> None:
    model = MegatronModelConfig(
        vocab_size=8,
        hidden_size=heads * 8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
    )
    layout = LayoutConfig(context_parallel_size=size, context_parallel_method=method)
    predicted = asdict(context_costs(model, layout, 32, micro_batch_size=2, number_bytes=4))
    for found in ranks.run(size, workers.attention_costs, method, 32, heads, key_values):
        assert found == {name: predicted[name] for name in found}


def test_layer_keeps_what_korthikanti_counts() -> None:
    model = MegatronModelConfig(
        vocab_size=51200,
        hidden_size=12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        hidden_dropout=0.1,
    )
    for tensor, context in ((1, 1), (8, 4)):
        layout = LayoutConfig(tensor_parallel_size=tensor, context_parallel_size=context)
        costs = context_costs(model, layout, 131_072)
        tokens = 131_072 // context
        sums = 4 * tokens * 96 // tensor  # FlashAttention's log-sum-exps, which the paper does not have
        assert costs.kept == 34 * tokens * 12288 // tensor + sums
        assert costs.kept_recomputing == 2 * tokens * 12288 // tensor
    # Liu et al.: a block hides its message from F / B on; ours does half the work of a whole block.
    assert tokens_that_hide_messages(model, 312e12, 300e9) == pytest.approx(2 * 312e12 / 300e9)


def test_queries_that_see_nothing_change_nothing() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64).unbind()
    documents = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 0, 1]])
    output, sums = attend(query, key, value, Visibility(documents=documents))
    assert (output[:, :, 3] == 0.0).all()
    assert (sums[:, :, 3] == -torch.inf).all()
    merged, merged_sums = torch.zeros_like(output), torch.full_like(sums, -torch.inf)
    merge(merged, merged_sums, output, sums)
    assert torch.equal(merged, output)
    assert torch.equal(merged_sums, sums)
    gradients = attend_backward(output, query, key, value, output, sums, Visibility(documents=documents))
    assert all(item.isfinite().all() for item in gradients)
    assert (gradients[0][:, :, 3] == 0.0).all()


def test_shared_sequences_train_and_validate_like_whole_ones(ranks: RankPool, tmp_path: Path) -> None:
    """And their checkpoint is one that a single process goes on from."""
    losses, validation = {}, {}
    for name, sizes in (("one", (1, 1)), ("shared", (2, 1))):
        folder = tmp_path / name
        folder.mkdir()
        for size, steps in zip(sizes, (4, 6)):
            config = small_config(
                folder,
                layout=LayoutConfig(context_parallel_size=size, data_parallel_size=1),
                evaluation=EvaluationConfig(interval_steps=3, num_batches=3),
                stop=StopConfig(steps=steps),
            )
            config.model.hidden_dropout = 0.0
            found = ranks.run(size, train_laid_out, config)[0]
            losses.setdefault(name, {}).update(found["losses"])
        assert found["result"].tokens == 6 * 8 * 16
        validation[name] = found["result"].validation_loss
    assert sorted(losses["shared"]) == [1, 2, 3, 4, 5, 6]
    assert losses["shared"] == pytest.approx(losses["one"], rel=2e-5)
    assert validation["shared"] == pytest.approx(validation["one"], rel=2e-5)


def test_samples_are_written_by_the_whole_model(ranks: RankPool) -> None:
    found = ranks.run(2, workers.gathered_loss)
    assert found[1] is None
    assert found[0] == pytest.approx(workers.gathered_loss(), rel=1e-6)


def test_ranks_that_share_sequences_drop_different_hidden_elements(ranks: RankPool) -> None:
    assert len(set(ranks.run(4, workers.dropout_of_hidden_states))) == 4


def test_the_kernel_of_gpus_is_called_as_torch_declares_it() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 8, 64, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.empty(2, 2, 32, 64, device="cuda", dtype=torch.bfloat16)
        output, sums = attend(query, key, key, Visibility())
        assert output.shape == query.shape
        assert sums.shape == (2, 8, 64)
        gradients = attend_backward(query, query, key, key, output, sums, Visibility())
        assert [item.shape for item in gradients] == [query.shape, key.shape, key.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_of_gpus_gives_the_same_block(causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    query, gradient = torch.randn(2, 2, 8, 96, 64, generator=generator).bfloat16().unbind()
    key, value = torch.randn(2, 2, 2, 96, 64, generator=generator).bfloat16().unbind()
    blocks = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        tensors = [item.to(device, dtype) for item in (query, key, value)]
        output, sums = attend(*tensors, Visibility(causal))
        found = attend_backward(gradient.to(device, dtype), *tensors, output, sums, Visibility(causal))
        blocks.append([item.double().cpu() for item in (output, sums, *found)])
    for ours, theirs in zip(*blocks):
        assert float((ours - theirs).abs().max() / ours.abs().max()) < 0.02

"""Recomputation changes what is kept and no number."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tests.parallel import memory_workers
from tests.parallel.parity import GPT, LLAMA, layout_fields
from tests.ranks import RankPool

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig, TrainingConfig
from mtnlg.parallel import build_mesh, lay_out, offload
from mtnlg.parallel.activation_budget import FULL, LEVELS, Cost, choose
from mtnlg.parallel.activation_memory import LayerShape, korthikanti, layer_bytes, measure_layers
from mtnlg.parallel.remake import remaking, result_of
from mtnlg.tokens.batch import Batch

WIDE = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    activation_function="gelu",
)
ROWS, LENGTH = 2, 256
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "max_position_embeddings": 16}
NORMS = ["normalization", "activation"]
ALL = ["attention", "normalization", "activation", "linear"]


def operators(*names: str) -> dict[str, Any]:
    return {"activation_recomputation": "operators", "recomputed_operators": list(names)}


def budget(share: float) -> dict[str, Any]:
    return {"activation_recomputation": "budget", "activation_memory_budget": share}


SWITCHES = [
    {"activation_recomputation": "selective"},
    {"activation_recomputation": "full"},
    *(operators(name) for name in ALL),
    operators(*NORMS),
    operators(*ALL),
    budget(0.5),
    budget(0.0),
]


def assert_all_equal(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes[1:]:
        assert outcome.keys() == outcomes[0].keys()
        for name, value in outcome.items():
            assert np.array_equal(value, outcomes[0][name]), name


@pytest.mark.parametrize("family", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
def test_gradients_are_those_of_a_run_that_keeps_everything(family, dropout):
    model = {**family, **dropout}
    outcomes = memory_workers.gradients_with(model, layout_fields(1, 1, 1), [{}, *SWITCHES])
    assert_all_equal(outcomes)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_ranks_repeat_their_masks(ranks: RankPool, sequence_parallel: bool):
    layout = {**layout_fields(2, 1, 1), "sequence_parallel": sequence_parallel}
    some = [SWITCHES[0], SWITCHES[1], operators(*ALL), budget(0.5)]
    results = ranks.run(2, memory_workers.gradients_with, {**GPT, **DROPOUT}, layout, [{}, *some])
    for outcomes in results:
        assert_all_equal(outcomes)


LEVEL_SWITCHES = [{} if not level else operators(*sorted(level)) for level in LEVELS if level != FULL]
LEVEL_SWITCHES.append({"activation_recomputation": "full"})


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, True), (2, True), (2, False)])
def test_measured_bytes_are_those_of_the_formula(ranks: RankPool, tensor: int, sequence_parallel: bool):
    layout = {**layout_fields(tensor, 1, 1), "sequence_parallel": sequence_parallel}
    args = (WIDE, layout, LEVEL_SWITCHES, ROWS, LENGTH)
    for measured in ranks.run(tensor, memory_workers.layer_bytes, *args):
        shape = LayerShape(ROWS, LENGTH, 64, 4, 256, tensor, sequence_parallel)
        for level, layers in zip(LEVELS, measured):
            assert layers == pytest.approx([layer_bytes(shape, level)] * 2, rel=0.02), sorted(level)
        kept = dict(zip(LEVELS, (layers[0] for layers in measured)))
        attention = kept[frozenset(["attention"])]
        assert kept[frozenset()] > attention > kept[LEVELS[-2]] > kept[FULL]


def test_formula_is_the_papers_but_for_what_is_named():
    """In 16 bits, without its two masks of one byte and without attention weights."""
    shape = LayerShape(1, 128, 64, 4, 256)
    ours = layer_bytes(shape, frozenset(["attention"]), element_size=2)
    stream = 128 * 64
    statistics = 16 * 128
    assert ours - statistics == korthikanti(shape, "selective") - 2 * stream
    assert layer_bytes(shape, FULL, element_size=2) == korthikanti(shape, "full")


@pytest.mark.parametrize("model", [WIDE, {**LLAMA, "num_hidden_layers": 4}], ids=["gpt", "llama"])
def test_budget_is_kept_and_made_use_of(model):
    config, mesh = MegatronModelConfig(**model), build_mesh(LayoutConfig(data_parallel_size=1))
    length = 16 if "qk_normalization" in model else LENGTH
    config = MegatronModelConfig(**{**model, "max_position_embeddings": length})

    def kept(switches: dict[str, Any]) -> int:
        return sum(measure_layers(config, mesh, TrainingConfig(**switches), ROWS, length))

    everything = kept({})
    least = kept({"activation_recomputation": "full"})
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        assert share * everything / 3 < kept(budget(share)) <= share * everything
    assert kept(budget(1.0)) == everything and kept(budget(0.0)) == least
    with pytest.raises(ConfigError, match="the inputs of the layers alone take"):
        kept(budget(0.5 * least / everything))


def test_budget_computes_least_again():
    costs = [Cost(100, 0.0), Cost(80, 1.0), Cost(30, 10.0), Cost(10, 50.0)]
    assert choose(costs, 4, 1.0) == [0, 0, 0, 0]
    assert choose(costs, 4, 0.8) == [1, 1, 1, 1]
    assert choose(costs, 4, 0.7) == [2, 1, 1, 1]
    assert choose(costs, 4, 0.1) == [3, 3, 3, 3]
    assert choose(costs, 4, 0.0) == [3, 3, 3, 3]


def test_result_is_made_again_once_for_all_its_uses():
    calls = []

    def double(values):
        calls.append(1)
        return values * 2.0

    values = torch.arange(4.0, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    with remaking(frozenset(["activation"])):
        result = result_of("activation", double, values)
        seen = weakref.ref(result.untyped_storage())
        total = (result * weight).sum() + (result.view(2, 2).t() * weight.view(2, 2)).sum()
        address = weakref.ref(result)
    del result
    gc.collect()
    assert address() is None and seen() is None and len(calls) == 1
    total.backward()
    assert len(calls) == 2
    assert torch.equal(weight.grad, torch.tensor([0.0, 2.0, 4.0, 6.0]) + torch.tensor([0.0, 4.0, 2.0, 6.0]))


@pytest.mark.parametrize("switches", [{}, SWITCHES[1], operators(*NORMS), budget(0.5)])
def test_offloaded_activations_come_back_as_they_were(monkeypatch, switches):
    """On a CPU the copies are as good as on a GPU, and of no use: the setting itself is refused."""
    monkeypatch.setattr(offload, "MIN_BYTES", 256)
    monkeypatch.setattr(TrainingConfig, "check_device", lambda *_: None)
    away = {**switches, "activation_offload": True}
    model = {**GPT, **DROPOUT}
    assert_all_equal(memory_workers.gradients_with(model, layout_fields(1, 1, 1), [{}, away]))


def test_ranks_choose_together_whatever_each_has_measured(ranks: RankPool) -> None:
    """They gather sequences again in the backward pass: one that chose otherwise would wait for ever."""
    switches = [{}, budget(0.45)]
    args = ({**GPT, "num_hidden_layers": 4}, layout_fields(2, 1, 1), switches)
    for found in ranks.run(2, memory_workers.gradients_with_unequal_meters, *args, timeout=60.0):
        assert_all_equal(found)


def test_offload_is_refused_on_a_cpu():
    config, mesh = MegatronModelConfig(**GPT), build_mesh(LayoutConfig(data_parallel_size=1))
    with pytest.raises(ConfigError, match="in the CPU's memory already"):
        lay_out(config, mesh, switches=TrainingConfig(activation_offload=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_frees_the_gpus_memory():
    config = MegatronModelConfig(**{**WIDE, "hidden_size": 256, "num_hidden_layers": 8})
    mesh = build_mesh(LayoutConfig(data_parallel_size=1), "cuda")
    ids = torch.zeros(8, LENGTH, dtype=torch.long, device="cuda")
    held, gradients = [], []
    for away in (False, True):
        model = lay_out(config, mesh, switches=TrainingConfig(activation_offload=away))
        model.forward_backward([Batch(ids, ids)], 1.0)
        gradients.append([p.grad.clone() for _, p in model.named_parameters()])
        before = torch.cuda.memory_allocated()
        loss = model.stages[0](ids, ids)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del loss
    assert held[1] < 0.3 * held[0]
    assert all(torch.equal(one, two) for one, two in zip(*gradients))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_recomputation": "operators", "recomputed_operators": []}, "recomputed_operators"),
        ({"recomputed_operators": ["softmax"]}, "name some of attention, normalization"),
        ({"activation_memory_budget": 1.5}, r"must be in \[0, 1\]"),
        ({"compile": True, "activation_recomputation": "budget"}, "does not go with budget"),
        ({"compile": True, **operators(*ALL)}, "does not go with operators"),
        ({"compile": True, "activation_offload": True}, "does not go with activation_offload"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**fields)

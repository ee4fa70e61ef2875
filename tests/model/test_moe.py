"""Mixture of experts: routing, products, losses; against loops, closed forms and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config import ConfigError
from mtnlg.generation.runner import PlainRunner, Row
from mtnlg.model import MixtureOfExperts
from mtnlg.model.router import balance_loss, count_selected, moved_bias
from mtnlg.training.flops import forward_flops

EXPERTS: dict[str, Any] = dict(
    num_experts=5,
    num_experts_per_token=2,
    moe_intermediate_size=12,
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    normalization="rmsnorm",
    position_embedding="rotary",
)
DENSE = {name: value for name, value in EXPERTS.items() if "expert" not in name and "moe" not in name}
IDS = torch.randint(0, 53, (3, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def make_moe(make_model):
    def make(**fields: Any) -> MixtureOfExperts:
        block = make_model(**{**EXPERTS, **fields}).layers["0"].mlp
        assert isinstance(block, MixtureOfExperts)
        return block

    return make


def by_loops(block: MixtureOfExperts, token: Tensor) -> Tensor:
    """The definition, token by token and expert by expert, in float64."""
    router, experts = block.router, block.experts
    logits = router.weight.double() @ token
    scores = logits.softmax(0) if router.score_function == "softmax" else logits.sigmoid()
    bias = 0.0 if router.selection_bias is None else router.selection_bias.double()
    chosen = (scores + bias).argsort(descending=True)[: router.num_selected]
    weights = scores[chosen]
    if router.normalizes:
        weights = weights / weights.sum()
    output = torch.zeros_like(token)
    for expert, weight in zip(chosen.tolist(), weights * router.scaling_factor):
        inner = experts.activation(
            (experts.up if experts.gate is None else experts.gate)[expert].double() @ token
        )
        if experts.gate is not None:
            inner = inner * (experts.up[expert].double() @ token)
        output += weight * (experts.down[expert].double() @ inner)
    if block.shared is not None:
        shared = block.shared
        assert shared.gate is not None
        inner = F.silu(shared.gate.weight.double() @ token) * (shared.up.weight.double() @ token)
        output += shared.down.weight.double() @ inner
    return output


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(num_experts_per_token=1),
        dict(num_experts_per_token=5, normalize_router_weights=False),
        dict(activation_function="gelu"),
        dict(num_shared_experts=2),
        dict(router_score_function="sigmoid", router_scaling_factor=2.5),
        dict(router_score_function="sigmoid", router_load_balancing="bias", num_shared_experts=1),
    ],
    ids=str,
)
def test_it_is_the_sum_over_the_chosen_experts(make_moe, fields):
    block = make_moe(**fields)
    if block.router.selection_bias is not None:
        block.router.selection_bias.copy_(torch.tensor([0.5, -0.5, 0.2, 0.0, -0.2]))
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([by_loops(block, token) for token in hidden.flatten(0, 1).double()])
    torch.testing.assert_close(block(hidden).flatten(0, 1), expected.float(), atol=1e-5, rtol=1e-5)


def test_a_token_alone_gets_what_it_gets_in_a_crowd(make_moe):
    """Nothing is dropped, whatever the others choose."""
    block = make_moe()
    token = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(1))
    crowd = token.expand(1, 40, 24)  # all of them choose the same two experts
    torch.testing.assert_close(block(crowd), block(token).expand_as(crowd))


def test_experts_that_nobody_chose_have_zero_gradient(make_moe):
    block = make_moe(num_experts_per_token=1)
    hidden = torch.randn(1, 1, 24)
    chosen = int(block.router(hidden).selected)
    block(hidden).sum().backward()
    for weight in block.experts.parameters():
        assert [bool(gradient.any()) for gradient in weight.grad] == [n == chosen for n in range(5)]


def test_the_router_computes_in_float32(make_moe):
    block = make_moe().bfloat16()
    hidden = torch.randn(1, 9, 24).bfloat16()
    routing = block.router(hidden)
    logits = hidden.float() @ block.router.weight.float().t()
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.selected, logits.softmax(-1).topk(2).indices)
    assert block(hidden).dtype == torch.bfloat16


class TestLosses:
    def sums(self, block: MixtureOfExperts) -> list[float]:
        return block.router.losses.totals.tolist()

    def test_equal_load_and_equal_scores_cost_one_for_each_token(self):
        scores = torch.full((2, 10, 5), 0.2)
        counts = torch.full((2, 5), 4)
        assert balance_loss(scores, counts).item() == pytest.approx(20.0)

    def test_all_to_one_expert_costs_the_number_of_experts(self):
        scores = F.one_hot(torch.zeros(2, 10, dtype=torch.long), 5).float()
        counts = torch.tensor([[10, 0, 0, 0, 0]] * 2)
        assert balance_loss(scores, counts).item() == pytest.approx(5 * 20.0)

    def test_it_does_not_depend_on_which_sequences_share_a_batch(self, make_model):
        model = make_model(**EXPERTS, router_z_loss_coefficient=0.1)
        gradients = []
        for parts in (IDS.split(3), IDS.split(1)):
            model.zero_grad()
            for layer in model.layers.values():
                layer.mlp.router.losses.reset()
            for part in parts:
                model(part, part).loss.backward()
            gradients.append(model.layers["0"].mlp.router.weight.grad.clone())
            totals = [self.sums(layer.mlp) for layer in model.layers.values()]
            assert [sum(total[:5]) for total in totals] == [2 * IDS.numel()] * 2
        torch.testing.assert_close(*gradients)

    def test_the_gradient_is_that_of_the_sum(self, make_model):
        """Against automatic differentiation of the loss written out."""
        coefficients = dict(router_aux_loss_coefficient=0.3, router_z_loss_coefficient=0.2)
        model = make_model(**EXPERTS, **coefficients, num_hidden_layers=1)
        router = model.layers["0"].mlp.router
        router.losses.factor = 0.25
        inputs = torch.randn(2, 6, 24)
        weights, selected, _ = router(inputs)
        (weights.sum() * 0.0).backward()
        found = router.weight.grad.clone()
        router.weight.grad = None
        logits = inputs @ router.weight.t()
        chosen = F.one_hot(selected, 5).sum((1, 2)) / 12.0  # [batch, experts] share of the choices
        balance = 5.0 * (chosen[:, None] * logits.softmax(-1)).sum()
        (0.25 * (0.3 * balance + 0.2 * logits.logsumexp(-1).square().sum())).backward()
        torch.testing.assert_close(found, router.weight.grad, atol=1e-6, rtol=1e-5)

    def test_only_training_adds_and_counts(self, make_model):
        model = make_model(**EXPERTS, router_z_loss_coefficient=1.0)
        losses = model.layers["0"].mlp.router.losses
        model(IDS, IDS)
        assert losses.totals is None, "a forward pass alone trains nothing"
        model.eval()
        model(IDS, IDS).loss.backward()
        assert losses.totals is None

    def test_the_loss_is_the_cross_entropy_alone(self, make_model):
        plain = make_model(**EXPERTS)
        with_losses = make_model(**EXPERTS, router_aux_loss_coefficient=9.0, router_z_loss_coefficient=9.0)
        assert torch.equal(plain(IDS, IDS).loss, with_losses(IDS, IDS).loss)

    @pytest.mark.parametrize("experts_per_token", [1, 2])
    def test_transformers_has_the_same_balance_loss(self, experts_per_token):
        """Of one layer and one sequence, where its definition and ours coincide but for a factor."""
        transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        logits = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(0))
        theirs = transformers.load_balancing_loss_func((logits[0],), 5, experts_per_token)
        selected = logits.topk(experts_per_token).indices
        ours = balance_loss(logits.softmax(-1), count_selected(selected, 5)) / 40
        assert theirs.item() == pytest.approx(experts_per_token * ours.item(), rel=1e-5)


def test_the_bias_follows_the_load():
    counts = torch.tensor([8.0, 2.0, 5.0, 5.0])
    bias = moved_bias(torch.zeros(4), counts, 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))


def test_the_bias_chooses_and_does_not_weigh(make_moe):
    block = make_moe(router_load_balancing="bias", num_experts_per_token=1, normalize_router_weights=False)
    hidden = torch.randn(1, 6, 24)
    block.router.selection_bias[3] = 100.0
    weights, selected, _ = block.router(hidden)
    assert selected.unique().tolist() == [3]
    scores = (hidden @ block.router.weight.t()).softmax(-1)
    torch.testing.assert_close(weights, scores[..., 3:4])


def test_generation_with_a_cache_is_the_whole_pass(make_model):
    model = make_model(**EXPERTS, num_shared_experts=1).eval()
    whole = model(IDS).logits
    runner = PlainRunner(model, num_pages=2 * len(IDS))
    found, start = [], 0
    for part in IDS.split([4, 1, 1, 5], dim=1):
        count = part.shape[1]
        rows = [Row(ids.tolist(), start, [2 * n, 2 * n + 1], count) for n, ids in enumerate(part)]
        found.append(runner.run(rows).unflatten(0, (len(IDS), count)))
        start += count
    torch.testing.assert_close(torch.cat(found, dim=1), whole)


def test_operations_count_the_experts_a_token_goes_through(config):
    few = forward_flops(config(**EXPERTS), 16)
    many = forward_flops(config(**{**EXPERTS, "num_experts": 50}), 16)
    assert many.linear - few.linear == 2.0 * 45 * 24 * 2, "the router's columns, of two layers"
    dense = forward_flops(config(**{**DENSE, "intermediate_size": 2 * 12}), 16)
    assert few.linear - dense.linear == 2.0 * 5 * 24 * 2, "two experts of 12 are an MLP of 24"


def test_which_layers_have_experts(make_model):
    model = make_model(**EXPERTS, num_hidden_layers=6, num_dense_layers_first=2, moe_layer_interval=2)
    found = [isinstance(layer.mlp, MixtureOfExperts) for layer in model.layers.values()]
    assert found == [False, False, False, True, False, True]
    for index, layer in enumerate(model.layers.values()):
        count = sum(parameter.numel() for parameter in layer.parameters())
        assert count == model.config.num_parameters_of_layer(index)


def test_first_values_of_experts(make_model):
    model = make_model(**EXPERTS, num_shared_experts=1, num_hidden_layers=8)
    block = model.layers["0"].mlp
    up, down = block.experts.up, block.experts.down
    assert not torch.equal(up[0], up[1]), "each expert has numbers of its own"
    assert up.std().item() == pytest.approx(0.2, rel=0.1)
    assert down.std().item() == pytest.approx(0.2 / 4.0, rel=0.1)
    assert block.shared.down.weight.std().item() == pytest.approx(0.2 / 4.0, rel=0.2)
    more = make_model(**{**EXPERTS, "num_experts": 7}, num_hidden_layers=8).layers["0"].mlp
    assert torch.equal(more.experts.up[:5], up)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_shared_experts=1), "num_shared_experts is 1: it has no effect without num_experts"),
        (dict(EXPERTS, num_experts_per_token=6), "num_experts_per_token is 6: there are only 5"),
        (dict(EXPERTS, mlp_bias=True), "mlp_bias"),
        (dict(EXPERTS, num_dense_layers_first=2), "none of the 2 layers"),
        (dict(EXPERTS, moe_layer_interval=0), "moe_layer_interval is 0"),
        (dict(EXPERTS, router_score_function="tanh"), "softmax, sigmoid"),
        (dict(EXPERTS, router_load_balancing="luck"), "auxiliary_loss, bias, none"),
        (
            dict(EXPERTS, router_load_balancing="none", router_aux_loss_coefficient=0.1),
            "router_aux_loss_coefficient is 0.1",
        ),
        (dict(EXPERTS, router_bias_update_rate=0.1), "only with router_load_balancing: bias"),
        (dict(EXPERTS, router_z_loss_coefficient=-1.0), "router_z_loss_coefficient is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(config, fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)

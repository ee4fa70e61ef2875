"""AdamW against torch's, Muon against its formula in float64, and which parameters decay."""

import pytest
import torch
from torch import nn

from mtnlg.config import MegatronModelConfig, OptimizerConfig
from mtnlg.model import MegatronLmDecoder
from mtnlg.training.muon import NEWTON_SCHULZ_COEFFICIENTS, orthogonalize, rate_factor
from mtnlg.training.optimizers import Optimizer

CONFIG = MegatronModelConfig(
    vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8
)


@pytest.fixture
def model() -> MegatronLmDecoder:
    torch.manual_seed(3)
    return MegatronLmDecoder(CONFIG)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_equals_torch(model):
    import copy

    twin = copy.deepcopy(model)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(learning_rate=3e-3))
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(5):
        factor = 1.0 / (step + 1)
        set_gradients(model, step)
        set_gradients(twin, step)
        for group in reference.param_groups:
            group["lr"] = 3e-3 * factor
        reference.step()
        optimizer.step(factor)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradient_divisor_divides_the_gradients(model, name):
    import copy

    twin = copy.deepcopy(model)
    config = OptimizerConfig(name=name, epsilon=1.0)  # makes AdamW's step depend on the scale
    one, two = Optimizer(model.named_parameters(), config), Optimizer(twin.named_parameters(), config)
    set_gradients(model, 0)
    set_gradients(twin, 0)
    for parameter in twin.parameters():
        parameter.grad *= 4.0
    one.step(1.0)
    two.step(1.0, gradient_divisor=4.0)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(model, name):
    """Without gradients' pull, decay alone moves a parameter."""
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(name=name, weight_decay=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for parameter_name, parameter in model.named_parameters():
        decayed = bool((parameter < 1.0).all())
        assert decayed == (parameter.ndim >= 2), parameter_name


def test_muon_takes_the_matrices_of_layers_only(model):
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(name="muon"))
    by_rule = {group.rule: set(group.names) for group in optimizer.groups if group.rule == "muon"}
    expected = {n for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert by_rule["muon"] == expected
    assert len(expected) == 6 * CONFIG.num_hidden_layers
    state = optimizer.state_dict()
    assert "embedding.tokens.weight.exp_avg" in state
    assert "layers.0.attention.query.weight.momentum_buffer" in state


def reference_orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz on the singular values: each round maps s to a s + b s^3 + c s^5."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(12, 12), (7, 20), (20, 7)])
def test_orthogonalize_equals_the_formula_on_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference_orthogonalize(matrix)
    torch.testing.assert_close(orthogonalize(matrix), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), expected, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(expected)
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_equals_the_published_rule_in_float64():
    shape, rate, momentum, decay = (10, 6), 0.02, 0.95, 0.1
    generator = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    expected, buffer = parameter.detach().double().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Optimizer([("layers.0.mlp.up.weight", parameter)], OptimizerConfig(name="muon"))
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step(0.5)
        buffer = momentum * buffer + (1 - momentum) * gradient.double()
        direction = (1 - momentum) * gradient.double() + momentum * buffer
        expected *= 1 - 0.5 * rate * decay
        expected -= 0.5 * rate * rate_factor(*shape) * reference_orthogonalize(direction)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_zero_gradient_orthogonalizes_to_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_muon_takes_each_expert_by_itself():
    matrices = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    each = torch.stack([orthogonalize(matrix) for matrix in matrices])
    assert torch.equal(orthogonalize(matrices), each)
    config = OptimizerConfig(name="muon", learning_rate=0.1)
    parameters = [("layers.0.mlp.experts.up", torch.nn.Parameter(matrices))]
    assert [group.rule for group in Optimizer(parameters, config).groups] == ["muon"]

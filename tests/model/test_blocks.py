"""The parts against their formulas, written out in numpy's float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtnlg.model.attention import Attention
from mtnlg.model.mlp import Mlp
from mtnlg.model.norms import make_norm
from mtnlg.model.positions import rotate, rotation_angles

RANDOM = np.random.default_rng(0)
_erf = np.vectorize(math.erf)

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def random_double(module: torch.nn.Module) -> torch.nn.Module:
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(RANDOM.normal(size=tuple(parameter.shape))))
    return module


@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
def test_mlp(config, name):
    mlp = random_double(Mlp(config(activation_function=name, intermediate_size=20)))
    w, x = weights(mlp), RANDOM.normal(size=(3, 24))
    up = x @ w["up.weight"].T + w["up.bias"]
    if name in GATES:
        up = ACTIVATIONS[GATES[name]](x @ w["gate.weight"].T + w["gate.bias"]) * up
    else:
        up = ACTIVATIONS[name](up)
    expected = up @ w["down.weight"].T + w["down.bias"]
    np.testing.assert_allclose(mlp(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(config, kind):
    norm = random_double(make_norm(config(normalization=kind, layernorm_eps=0.01)))
    w, x = weights(norm), RANDOM.normal(size=(3, 24)) + 2
    if kind == "layernorm":
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.01) * w["weight"] + w["bias"]
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * w["weight"]
    np.testing.assert_allclose(norm(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("percent", "base"), [(1.0, 10000.0), (0.5, 100.0)])
def test_rotary_positions_turn_pairs_of_dimensions(config, percent, base):
    settings = config(position_embedding="rotary", head_dim=8, rotary_percent=percent, rotary_base=base)
    positions = torch.tensor([[0, 3, 29]])
    heads = RANDOM.normal(size=(1, 2, 3, 8))
    found = rotate(torch.from_numpy(heads), rotation_angles(settings, positions, torch.float64)).numpy()
    size = settings.rotary_dim
    expected = heads.copy()
    for column, position in enumerate([0, 3, 29]):
        for pair in range(size // 2):
            angle = position / base ** (2 * pair / size)
            first, second = heads[..., column, pair], heads[..., column, pair + size // 2]
            expected[..., column, pair] = first * math.cos(angle) - second * math.sin(angle)
            expected[..., column, pair + size // 2] = second * math.cos(angle) + first * math.sin(angle)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the angles are float32


def test_rotation_keeps_what_depends_on_distance(config):
    settings = config(position_embedding="rotary", head_dim=8)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(at: int, seen: int) -> float:
        turned = [
            rotate(v.view(1, 1, 1, 8), rotation_angles(settings, torch.tensor([[p]]), torch.float64))
            for v, p in ((query, at), (key, seen))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-4)


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("normalized", [False, True])
def test_attention(config, key_value_heads, normalized):
    settings = config(num_key_value_heads=key_value_heads, qk_normalization=normalized, layernorm_eps=0.01)
    attention = random_double(Attention(settings, 0))
    w, x = weights(attention), RANDOM.normal(size=(2, 5, 24))

    def project(name: str, heads: int) -> np.ndarray:
        flat = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        split = flat.reshape(2, 5, heads, 6)
        if normalized and name != "value":
            split = split / np.sqrt((split**2).mean(-1, keepdims=True) + 0.01) * w[f"{name}_norm.weight"]
        return split

    query, key, value = (
        project("query", 4),
        project("key", key_value_heads),
        project("value", key_value_heads),
    )
    context = np.zeros((2, 5, 4, 6))
    for head in range(4):
        shared = head * key_value_heads // 4
        for at in range(5):
            scores = np.einsum("bd,bsd->bs", query[:, at, head], key[:, : at + 1, shared]) / math.sqrt(6)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            context[:, at, head] = np.einsum("bs,bsd->bd", shares, value[:, : at + 1, shared])
    expected = context.reshape(2, 5, 24) @ w["output.weight"].T + w["output.bias"]
    found = attention(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)

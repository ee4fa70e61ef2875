"""The CPU's kernels give the values and gradients of the plain model's own functions."""

import pytest
import torch
import torch.nn.functional as F

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.model.attention import scaled_dot_product
from mtnlg.parallel import cpu_attention
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.cpu_linear import onednn_linear
from mtnlg.parallel.mesh import build_mesh


def values_and_gradients(function, inputs):
    """Output of ``function`` and the gradients of a fixed weighting of it."""
    leaves = [item.detach().clone().requires_grad_() for item in inputs]
    output = function(*leaves)
    weighting = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape).to(output.dtype)
    return output, *torch.autograd.grad(output, leaves, weighting)


def heads(count, sequence, dtype=torch.float32):
    """As the model makes them: [batch, heads, sequence, head_dim] seen through a transposition."""
    return torch.randn(2, sequence, count, 8).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("kept_bytes", [0, 2**27], ids=["recomputed", "kept"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("sequence", [1, 5, 16, 37])
def test_blockwise_attention_is_attention(sequence, key_heads, kept_bytes, monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)
    monkeypatch.setattr(cpu_attention, "KEPT_BYTES", kept_bytes)
    inputs = heads(4, sequence), heads(key_heads, sequence), heads(key_heads, sequence)
    ours = values_and_gradients(cpu_attention.blockwise_attention, inputs)
    for actual, expected in zip(ours, values_and_gradients(scaled_dot_product, inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_blockwise_attention_in_bf16_errs_by_little_more_than_a_rounding(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)
    exact = [heads(4, 100) for _ in range(3)]
    rounded = [item.bfloat16() for item in exact]
    truth = values_and_gradients(scaled_dot_product, [item.float() for item in rounded])
    for true, our in zip(truth, values_and_gradients(cpu_attention.blockwise_attention, rounded)):
        assert our.dtype == torch.bfloat16
        assert (our - true).norm() < 1.5 * 2.0**-8 * true.norm()


def test_blockwise_attention_leaves_masks_to_torch():
    query, key, value = heads(4, 6), heads(2, 6), heads(2, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] & (torch.arange(6) != 2)
    mask |= torch.eye(6, dtype=torch.bool)
    actual = cpu_attention.blockwise_attention(query, key, value, mask)
    torch.testing.assert_close(actual, scaled_dot_product(query, key, value, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_linear_layer_is_linear(dtype, has_bias):
    inputs = [torch.randn(3, 7, 20).to(dtype), torch.randn(11, 20).to(dtype)]
    inputs += [torch.randn(11).to(dtype)] if has_bias else []
    ours, expected = (values_and_gradients(function, inputs) for function in (onednn_linear, F.linear))
    for actual, wanted in zip(ours, expected):
        torch.testing.assert_close(actual, wanted)


def test_frozen_weights_get_no_gradient():
    inputs, weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
    onednn_linear(inputs, weight).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(dim=0).expand(4, 5))


@pytest.mark.parametrize("family", [{}, {"position_embedding": "rotary", "num_key_value_heads": 2}])
def test_a_model_laid_out_for_a_cpu_computes_what_the_plain_one_does(family):
    config = MegatronModelConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, **family,
    )  # fmt: skip
    plain = MegatronLmDecoder(config)
    initialize_weights(plain, config, seed=1234)
    laid_out = lay_out(config, build_mesh(LayoutConfig()), seed=1234).decoder
    ids, labels = torch.randint(0, 97, (2, 2, 24))
    losses = [model(ids, labels).loss for model in (plain, laid_out)]
    torch.testing.assert_close(losses[1], losses[0])
    gradients = [
        torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (plain, laid_out))
    ]
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for one, other in zip(*gradients):
        assert float((one - other).abs().max()) < 1e-5 * largest


def test_layers_compile_with_these_kernels():
    """Traced, not compiled to code: that the operators can be, is a matter of their signatures."""
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    inputs = torch.randn(2, 3, 4, requires_grad=True)
    compiled = torch.compile(onednn_linear, backend="aot_eager")
    ours, expected = (
        values_and_gradients(function, (inputs, weight, bias)) for function in (compiled, F.linear)
    )
    for actual, wanted in zip(ours, expected):
        torch.testing.assert_close(actual, wanted)

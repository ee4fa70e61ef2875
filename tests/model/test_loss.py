from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtnlg.model import loss as loss_module
from mtnlg.model import summed_cross_entropy

GENERATOR = torch.Generator().manual_seed(0)


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(3, 7, 16, generator=GENERATOR).to(dtype)
    weight = torch.randn(29, 16, generator=GENERATOR).to(dtype)
    labels = torch.randint(0, 29, (3, 7), generator=GENERATOR)
    labels[0, :3] = -100
    labels[2, 6] = -100
    return hidden, weight, labels


def reference(hidden, weight, labels):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens_at_once", [1, 4, 5, 21, 1000])
def test_chunks_equal_the_whole_in_float64(monkeypatch, tokens_at_once):
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", 4 * 29 * tokens_at_once)
    hidden, weight, labels = case()
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, labels)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = summed_cross_entropy(hidden, weight, labels)
    (3.0 * loss).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), 3 * hidden_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 3 * weight_gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, weight, labels), loss.detach())


def test_the_sum_is_float32_whatever_the_inputs():
    hidden, weight, labels = case(torch.bfloat16)
    expected, hidden_gradient, _ = reference(hidden, weight, labels)
    hidden.requires_grad_()
    loss = summed_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    assert (hidden.grad.double() - hidden_gradient).abs().max() < 0.02 * hidden_gradient.abs().max()


def test_nothing_valid_gives_zero_and_no_gradient():
    hidden, weight, labels = case()
    hidden.requires_grad_()
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss) == 0.0
    assert not hidden.grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, labels = case()
    expected, _, _ = reference(hidden * 1000, weight, labels)
    loss = summed_cross_entropy((hidden * 1000).requires_grad_(), weight, labels)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_chunk_never_holds_more_than_its_share():
    for tokens, vocab in ((1, 50257), (8192, 50257), (3, 10**9), (0, 10)):
        step = loss_module.tokens_per_chunk(tokens, vocab)
        assert step >= 1
        assert step == 1 or 4 * step * vocab <= loss_module.LOGITS_BYTES

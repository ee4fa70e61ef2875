"""Float32 masters outside, 16-bit weights inside."""

import pytest
import torch
from torch import nn

from mtnlg.config import LayoutConfig, MegatronModelConfig, PrecisionConfig
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.mesh import build_mesh
from mtnlg.parallel.working_copy import WorkingCopy
from mtnlg.tokens.batch import Batch

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16"])
def pair(request):
    model = nn.Linear(4, 3)
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    return model, before, WorkingCopy(dict(model.named_parameters()), request.param), request.param


def test_masters_keep_every_bit_and_the_model_is_rounded(pair):
    model, before, copy, dtype = pair
    copy.refresh()
    for name, parameter in model.named_parameters():
        assert torch.equal(copy.masters[name], before[name])
        assert torch.equal(parameter, before[name].to(dtype))


def test_a_step_too_small_for_16_bits_is_not_lost(pair):
    model, _, copy, dtype = pair
    with torch.no_grad():
        copy.masters["weight"].fill_(1.0)
        copy.refresh()
        for _ in range(64):
            copy.masters["weight"] += 2.0**-12
            copy.refresh()
    assert torch.equal(model.weight, torch.full((3, 4), 1.0 + 2.0**-6, dtype=dtype))


def test_gradients_of_micro_batches_add_up_in_float32(pair):
    model, _, copy, dtype = pair
    inputs = torch.randn(5, 2, 4).to(dtype)
    expected = torch.zeros(3, 4)
    for item in inputs:
        model(item).sum().backward()
        expected += item.sum(dim=0).expand(3, 4).float()
    assert model.weight.grad is None
    gradient = copy.masters["weight"].grad
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(gradient, gradient.to(dtype).float())


def test_a_model_in_bf16_learns_and_shows_float32_weights():
    config = MegatronModelConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = lay_out(config, build_mesh(LayoutConfig()), precision=PrecisionConfig("bf16"))
    tokens = torch.randint(0, 61, (4, 17))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    first, valid = (float(value) for value in model.evaluate([batch]))
    for _ in range(20):
        model.forward_backward([batch], valid)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                parameter -= 0.15 * parameter.grad
        model.zero_gradients()
    last, _ = model.evaluate([batch])
    assert float(last) < 0.9 * first
    assert all(item.dtype == torch.float32 for item in model.state_dict().values())
    weight = model.decoder.head.output.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, model.state_dict()["embedding.tokens.weight"].bfloat16())

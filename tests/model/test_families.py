"""Loss and gradients equal those of transformers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtnlg.interop import write_hugging_face
from mtnlg.interop.weights import rules

LLAMA: dict[str, Any] = dict(
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(activation_function="gelu_tanh"),
    "llama": LLAMA,
    "qwen2": LLAMA | dict(attention_bias=True, attention_output_bias=False, tie_word_embeddings=True),
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=10),
}
IDS = torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(make_model, tmp_path, family):
    transformers = pytest.importorskip("transformers", reason="needs the interop extra (transformers)")
    model = make_model(**FAMILIES[family])
    write_hugging_face(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logits = theirs(IDS[:, :-1]).logits
    torch.testing.assert_close(model(IDS[:, :-1]).logits, logits, atol=2e-5, rtol=1e-4)
    loss = model(IDS[:, :-1], IDS[:, 1:]).loss
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    ours, their = dict(model.named_parameters()), dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in ours.values())
    for rule in rules(family, model.config):
        gradient = rule.to_theirs([ours[name].grad for name in rule.ours])
        difference = (gradient - their[rule.theirs].grad).abs().max()
        assert float(difference) <= 1e-5 * largest, rule.theirs

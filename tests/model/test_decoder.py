from __future__ import annotations

import pytest
import torch
from torch import nn

from mtnlg.model import MegatronLmDecoder

GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(0, 53, (2, 12), generator=GENERATOR)
LABELS = torch.randint(0, 53, (2, 12), generator=GENERATOR)
FAMILIES = {
    "gpt": {},
    "llama": dict(
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request, make_model) -> MegatronLmDecoder:
    return make_model(**FAMILIES[request.param])


def test_the_loss_is_the_sum_over_the_logits(model):
    logits = model(IDS).logits
    labels = LABELS.clone()
    labels[0, :5] = -100
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    output = model(IDS, labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None


def test_no_token_sees_a_later_one(model):
    changed = IDS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 53
    before, after = model(IDS).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_documents_in_one_row_equal_documents_in_rows_of_their_own(model):
    """Logits, loss and every gradient, with positions that start anew."""
    lengths = [5, 1, 6]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    loss = model(IDS, LABELS, position_ids=positions, document_ids=documents).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = zip(IDS.split(lengths, dim=1), LABELS.split(lengths, dim=1))
    alone = sum(model(ids, labels).loss for ids, labels in parts)
    alone.backward()
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) <= 1e-5 * largest, name


def test_positions_count_on_from_where_they_are_given(model):
    shifted = model(IDS, position_ids=torch.arange(4, 16)[None]).logits
    if model.config.position_embedding == "learned":
        assert not torch.allclose(shifted, model(IDS).logits, atol=1e-3)
    else:  # rotary positions are relative
        torch.testing.assert_close(shifted, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_an_attention_mask_overrides_the_causal_one(model):
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    assert not torch.allclose(model(IDS, attention_mask=mask).logits[:, 0], model(IDS).logits[:, 0])
    causal = mask.tril()
    torch.testing.assert_close(model(IDS, attention_mask=causal).logits, model(IDS).logits)


def test_logits_at_one_column(model):
    whole = model(IDS).logits
    found = model(IDS, logits_at=torch.tensor([11, 3])).logits
    assert found.shape == (2, 1, 53)
    torch.testing.assert_close(found[:, 0], torch.stack([whole[0, 11], whole[1, 3]]))


def test_cut_into_stages_it_computes_the_same_and_keeps_its_names(model, make_model, request):
    """A stage is the model with parts taken away."""
    first, second = (make_model(**FAMILIES[request.node.callspec.params["model"]]) for _ in range(2))
    first.head = None
    del first.layers["1"]
    second.embedding = None
    del second.layers["0"]
    hidden = first(IDS).hidden
    positions = torch.arange(12)[None]
    torch.testing.assert_close(second(hidden, position_ids=positions).logits, model(IDS).logits)
    names = {name for stage in (first, second) for name, _ in stage.named_parameters()}
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert names == expected


def test_meta_keeps_the_tie_and_has_no_numbers(config):
    with torch.device("meta"):
        model = MegatronLmDecoder(config())
    assert model.head.output.weight is model.embedding.tokens.weight
    assert model(IDS.to("meta")).logits.shape == (2, 12, 53)


def test_every_parameter_gets_a_gradient(model):
    model(IDS, LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if "key.bias" not in name:  # adding the same to all scores changes no softmax
            assert parameter.grad.any(), name


def test_the_model_knows_nothing_of_ranks_and_devices():
    """The plain model reads like the paper; layouts are applied from outside."""
    from pathlib import Path

    import mtnlg.model

    for file in Path(mtnlg.model.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for word in ("distributed", "DTensor", "world_size", "autocast", "cuda"):
            assert word not in text, f"{file.name}: {word}"

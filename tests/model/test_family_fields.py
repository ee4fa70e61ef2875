"""The fields that other families of decoders brought: each does what it says, beside plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig
from mtnlg.config.layout_rules import layout_problems
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.attention_scores import ScoredAttention, alibi_slopes
from mtnlg.model.norms import RMSNorm1p
from mtnlg.training.flops import forward_flops

IDS = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(1))
ROTARY = dict(position_embedding="rotary")


def by_hand(query, key, value, window=None, slopes=None, softcap=None):
    """One query and one key at a time, in float64."""
    found = torch.zeros_like(query)
    offset = key.shape[2] - query.shape[2]
    groups = query.shape[1] // key.shape[1]
    for row, head, place in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        end = place + offset
        start = 0 if window is None else max(0, end + 1 - window)
        keys, values = (item[row, head // groups, start : end + 1] for item in (key, value))
        scores = keys @ query[row, head, place] / math.sqrt(query.shape[-1])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[head] * torch.arange(end - start, -1, -1)
        found[row, head, place] = scores.softmax(dim=0) @ values
    return found


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_scored_attention_is_its_formula(window, has_slopes, softcap):
    torch.manual_seed(0)
    query = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, 7, 4, dtype=torch.float64)
    slopes = alibi_slopes(6) if has_slopes else None
    attention = ScoredAttention(window, slopes, softcap)
    expected = by_hand(query, key, value, window, slopes, softcap)
    torch.testing.assert_close(attention(query, key, value), expected, atol=1e-6, rtol=1e-6)
    last = attention(query[:, :, -1:], key, value)  # one token over what is cached
    torch.testing.assert_close(last, expected[:, :, -1:], atol=1e-6, rtol=1e-6)


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == tuple(2.0**-power for power in range(1, 9))
    assert alibi_slopes(12)[8:] == tuple(2.0**-power for power in (0.5, 1.5, 2.5, 3.5))
    part = ScoredAttention(slopes=alibi_slopes(4)).of_heads(slice(2, 4))
    assert part.slopes == alibi_slopes(4)[2:]


def test_a_window_hides_what_lies_further_back(make_model):
    model = make_model(sliding_window=3, num_hidden_layers=1, **ROTARY).eval()
    changed = IDS.clone()
    changed[:, :6] = 0
    assert torch.equal(model(changed).logits[:, 8:], model(IDS).logits[:, 8:])
    changed[:, 6] = 0
    assert not torch.equal(model(changed).logits[:, 8:], model(IDS).logits[:, 8:])
    everything = make_model(sliding_window=3, num_hidden_layers=2, full_attention_layers=[1], **ROTARY)
    assert [everything.config.window_of_layer(layer) for layer in range(2)] == [3, None]
    changed[:, 0] = 1
    assert not torch.equal(everything.eval()(changed).logits[:, 8:], everything(IDS).logits[:, 8:])


def test_operations_count_the_keys_in_the_window():
    config = MegatronModelConfig(sliding_window=100, full_attention_layers=[0], num_hidden_layers=4)
    whole = MegatronModelConfig(num_hidden_layers=4)
    share = (1000 + 3 * 100) / 4000
    assert forward_flops(config, 1000).attention == pytest.approx(
        share * forward_flops(whole, 1000).attention
    )


@pytest.mark.parametrize(
    "fields",
    [
        dict(norm_placement="after"),
        dict(norm_placement="around", normalization="rmsnorm_1p"),
        dict(embedding_norm=True, position_embedding="alibi"),
        dict(embedding_size=10, position_offset=3),
        dict(embedding_size=10, tie_word_embeddings=False),
        dict(parallel_residual=True),
        dict(
            num_experts=4, num_shared_experts=2, shared_expert_intermediate_size=7, shared_expert_gate=True,
            moe_intermediate_size=5, mlp_bias=False, activation_function="swiglu",
        ),
    ],
)  # fmt: skip
def test_the_predicted_count_is_the_built_models(make_model, fields):
    model = make_model(**fields)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters
    model(IDS, IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ({}, dict(norm_placement="after")),
        ({}, dict(norm_placement="around")),
        ({}, dict(parallel_residual=True)),
        ({}, dict(embedding_norm=True)),
        ({}, dict(embedding_scale=2.0)),
        ({}, dict(embedding_size=10)),
        ({}, dict(logit_softcap=0.5)),
        ({}, dict(attention_softcap=0.1)),
        ({}, dict(attention_scalar=50.0)),
        ({}, dict(position_embedding="alibi")),
        (ROTARY, dict(rotary_scaling=dict(rope_type="linear", factor=4.0))),
        (ROTARY | dict(sliding_window=4), dict(rotary_local_base=50.0)),
    ],
)
def test_each_field_changes_the_result(make_model, base, fields):
    plain, changed = (make_model(**kind).eval() for kind in (base, base | fields))
    assert not torch.allclose(plain(IDS).logits, changed(IDS).logits, atol=1e-4)


def test_weights_less_one(make_model):
    """A norm whose weights are kept less one is the other with one more, and starts as the same."""
    ones, less = make_model(normalization="rmsnorm"), make_model(normalization="rmsnorm_1p")
    assert isinstance(less.head.norm, RMSNorm1p)
    assert torch.equal(less(IDS).logits, ones(IDS).logits)
    with torch.no_grad():
        for one, other in zip(ones.parameters(), less.parameters()):
            if one.dim() == 1 and not torch.equal(one, other):
                other += 0.25
                one += 0.25
    torch.testing.assert_close(less(IDS).logits, ones(IDS).logits)


def test_capped_logits_stay_within_and_the_loss_has_their_gradient(make_model):
    model = make_model(logit_softcap=0.3)
    logits = model(IDS).logits
    assert logits.abs().max() < 0.3
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten(), reduction="sum")
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model(IDS, IDS).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_positions_that_follow_the_length_bound_what_is_cached():
    scaling = dict(
        rope_type="longrope", short_factor=[1.0] * 3, long_factor=[2.0] * 3,
        original_max_position_embeddings=20,
    )  # fmt: skip
    shape = dict(hidden_size=12, num_attention_heads=2, max_position_embeddings=64)
    assert MegatronModelConfig(**shape, **ROTARY, rotary_scaling=scaling).max_cached_length == 20
    assert MegatronModelConfig(**shape, **ROTARY).max_cached_length == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rotary_scaling=dict(rope_type="linear", factor=2.0)), "position_embedding is learned"),
        (ROTARY | dict(rotary_scaling=dict(rope_type="lama3")), "did you mean llama3"),
        (ROTARY | dict(rotary_scaling=dict(rope_type="yarn", factor=2.0)), "original_max_position_embedd"),
        (ROTARY | dict(rotary_scaling=dict(rope_type="linear", factor=-1)), "greater than 0"),
        (ROTARY | dict(rotary_scaling=dict(rope_type="linear", factor=2, beta_fast=1)), "has only factor"),
        (dict(rotary_local_base=10.0), "rotary_local_base"),
        (dict(full_attention_layers=[0]), "no effect without a sliding_window"),
        (dict(sliding_window=4, full_attention_layers=[12]), "numbered 0 to 11"),
        (dict(sliding_window=4, full_attention_layers=list(range(12))), "no layer is left"),
        (dict(sliding_window=0), "sliding_window is 0"),
        (dict(parallel_residual=True, norm_placement="after"), "norm_placement is after"),
        (ROTARY | dict(position_offset=2), "position_offset is 2"),
        (dict(norm_placement="inside"), "norm_placement is 'inside'"),
        (dict(num_experts=2, mlp_bias=False, shared_expert_gate=True), "no shared experts"),
    ],
)
def test_what_does_not_go_together_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        MegatronModelConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(sliding_window=4),
        dict(attention_softcap=2.0),
        dict(position_embedding="alibi"),
        ROTARY | dict(rotary_scaling=dict(rope_type="dynamic", factor=2.0)),
    ],
)
def test_parts_of_a_sequence_are_refused_before_anything_starts(fields):
    model = MegatronModelConfig(**fields)
    layout = LayoutConfig(context_parallel_size=2)
    problems = layout_problems(layout, model, sequence_length=64, micro_batches=1)
    assert [problem.split("model.")[1].split(" ")[0] for problem in problems] == [list(fields)[-1]]
    assert not layout_problems(LayoutConfig(), model, sequence_length=64, micro_batches=1)


def test_a_whole_model_on_meta():
    with torch.device("meta"):
        model = MegatronLmDecoder(MegatronModelConfig(norm_placement="after", embedding_size=512))
    assert next(model.parameters()).is_meta

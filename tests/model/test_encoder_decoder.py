"""T5's kind of model: positions, masks, documents, its parts, and how it starts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.model import IGNORED_LABEL, MegatronEncoderDecoder, initialize_weights
from mtnlg.model.relative import distance_buckets, unscaled_dot_product

GENERATOR = torch.Generator().manual_seed(1)
SOURCE = torch.randint(2, 61, (2, 9), generator=GENERATOR)
TARGET = torch.randint(2, 61, (2, 7), generator=GENERATOR)


def make_config(**fields: Any) -> MegatronModelConfig:
    shape = dict(
        architecture="encoder_decoder", vocab_size=61, hidden_size=20, num_hidden_layers=2,
        num_decoder_layers=3, num_attention_heads=3, head_dim=6, intermediate_size=36,
        position_embedding="relative", normalization="rmsnorm", activation_function="geglu_tanh",
        attention_bias=False, mlp_bias=False, init_method_std=0.2,
    )  # fmt: skip
    return MegatronModelConfig(**{**shape, **fields})


def make(seed: int = 0, **fields: Any) -> MegatronEncoderDecoder:
    model = MegatronEncoderDecoder(make_config(**fields)).eval()
    initialize_weights(model, model.config, seed)
    return model


def bucket_of(distance: int, num_buckets: int, max_distance: int, looks_ahead: bool) -> int:
    """The definition, one number at a time."""
    first = 0
    if looks_ahead:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(share * (num_buckets - exact)), num_buckets - 1)


@pytest.mark.parametrize("looks_ahead", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (6, 11), (4, 100)])
def test_buckets_are_those_of_the_definition(looks_ahead, buckets, far):
    distances = torch.arange(-300, 301)
    found = distance_buckets(distances, buckets, far, looks_ahead).tolist()
    expected = [bucket_of(d, buckets, far, looks_ahead) for d in distances.tolist()]
    differing = [d for d, a, b in zip(distances.tolist(), found, expected) if a != b]
    # Where the logarithm is a whole number, float32 may fall on the other side of it.
    assert len(differing) <= 4
    assert min(found) == 0
    assert max(found) == buckets - 1


def test_attention_does_not_scale_and_sees_all_without_a_mask():
    query, key, value = torch.randn(3, 2, 3, 5, 4).unbind(0)
    expected = (query @ key.transpose(2, 3)).softmax(-1) @ value
    torch.testing.assert_close(unscaled_dot_product(query, key, value), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"relative_attention_per_layer": True, "num_decoder_layers": None},
        {"attention_bias": True, "mlp_bias": True, "normalization": "layernorm", "num_key_value_heads": 1},
        {"activation_function": "relu", "num_hidden_layers": 1, "attention_output_bias": True},
    ],
)
def test_counted_parameters_are_those_built_and_all_learn(fields):
    model = make(**fields)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
    own = model.config.num_parameters_of_layer(model.config.total_layers - 1)
    assert sum(p.numel() for p in list(model.layers.values())[-1].parameters()) == own
    model(SOURCE, labels=TARGET).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_is_the_sum_over_valid_labels_of_the_shifted_target():
    model = make()
    labels = TARGET.clone()
    labels[0, 5:] = IGNORED_LABEL
    written = torch.cat((torch.zeros(2, 1, dtype=torch.long), labels[:, :-1].clamp_min(0)), dim=1)
    logits = model(SOURCE, written).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(SOURCE, labels=labels).loss, expected)


def test_token_ids_of_the_config_begin_and_fill_what_the_decoder_reads():
    model = make(decoder_start_token_id=5, pad_token_id=3)
    labels = torch.tensor([[7, IGNORED_LABEL, 8]])
    assert model.shift_right(labels).tolist() == [[5, 7, 3]]
    documents = torch.tensor([[0, 0, 1]])
    assert model.shift_right(labels, documents).tolist() == [[5, 7, 5]]


def test_the_decoder_sees_the_past_and_the_encoder_everything():
    model = make()
    changed = TARGET.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 61
    before, after = model(SOURCE, TARGET).logits, model(SOURCE, changed).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(dim=-1).all()
    other = SOURCE.clone()
    other[:, -1] = (other[:, -1] + 1) % 61
    assert (model.encode(SOURCE) != model.encode(other)).any(dim=-1).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_padding_on_either_side_changes_nothing(per_layer):
    model = make(relative_attention_per_layer=per_layer)
    expected = model(SOURCE, TARGET).logits
    for left in (0, 3):
        ids = F.pad(SOURCE, (left, 3 - left))
        mask = F.pad(torch.ones_like(SOURCE), (left, 3 - left))
        found = model(ids, F.pad(TARGET, (0, 2)), attention_mask=mask).logits[:, :7]
        torch.testing.assert_close(found, expected)
    left_of_target = F.pad(torch.ones_like(TARGET), (2, 0))
    found = model(SOURCE, F.pad(TARGET, (2, 0)), decoder_attention_mask=left_of_target).logits[:, 2:]
    torch.testing.assert_close(found, expected)


def test_packed_documents_give_the_loss_of_each_by_itself():
    model = make()
    sources = [SOURCE[0, :4], SOURCE[0, 4:], SOURCE[1, :3]]
    targets = [TARGET[0, :3], TARGET[0, 3:], TARGET[1, :2]]
    expected = sum(model(s[None], labels=t[None]).loss for s, t in zip(sources, targets))
    documents = [torch.repeat_interleave(torch.arange(3), torch.tensor([len(p) for p in parts]))[None]
                 for parts in (sources, targets)]  # fmt: skip
    packed = model(
        torch.cat(sources)[None],
        labels=torch.cat(targets)[None],
        document_ids=documents[0],
        decoder_document_ids=documents[1],
    )
    torch.testing.assert_close(packed.loss, expected)


class DictCache:
    """The simplest cache there can be."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.read: dict[int, Any] = {}
        self.length = 0

    def update(self, layer_index, key, value):
        if layer_index in self.kept:
            earlier = self.kept[layer_index]
            key, value = (torch.cat(pair, dim=2) for pair in zip(earlier, (key, value)))
        self.kept[layer_index] = (key, value)
        return key, value

    def memory(self, layer_index, make):
        if layer_index not in self.read:
            self.read[layer_index] = make()
        return self.read[layer_index]


@pytest.mark.parametrize("per_layer", [False, True])
def test_writing_in_pieces_with_a_cache_equals_writing_at_once(per_layer):
    model = make(relative_attention_per_layer=per_layer)
    mask = torch.ones_like(SOURCE)
    mask[0, 6:] = 0
    expected = model(SOURCE, TARGET, attention_mask=mask).logits
    memory, cache, found = model.encode(SOURCE, mask), DictCache(), []
    for piece in TARGET.split([3, 1, 1, 2], dim=1):
        hidden = model.decode(piece, memory if not found else None, mask.bool()[:, None, None], cache=cache)
        cache.length += piece.shape[1]
        found.append(model.head(hidden).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("cuts", [(0, 1, 3, 5), (0, 2, 5), (0, 4, 5)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_stages_cut_out_by_removing_parts_compute_the_same(cuts, per_layer):
    """No parameter is renamed, and the ends and positions that a stage does not need are None."""
    whole = make(relative_attention_per_layer=per_layer)
    memory = hidden = None
    for first, end in pairwise(cuts):
        stage = make(relative_attention_per_layer=per_layer)
        stage.load_state_dict(whole.state_dict())
        for index in set(range(5)) - set(range(first, end)):
            del stage.layers[str(index)]
        if first >= 2:
            stage.encoder_end = stage.encoder_positions = None
        if end <= 2:
            stage.decoder_positions = None
        if end < 2:
            stage.encoder_end = None
        if first > 2:
            stage.embedding = None
        if end < 5:
            stage.head = None
        assert dict(stage.named_parameters()).keys() <= dict(whole.named_parameters()).keys() | {
            "head.output.weight"
        }
        if first < 2:
            memory = stage.encode(SOURCE if first == 0 else memory)
        if end > 2:
            hidden = stage.decode(TARGET if hidden is None else hidden, memory, None)
        if stage.head is not None:
            torch.testing.assert_close(stage.head(hidden).logits, whole(SOURCE, TARGET).logits)


def test_fields_of_encoder_decoders_have_their_effect():
    plain = make()(SOURCE, TARGET).logits
    for fields in (
        {"relative_attention_num_buckets": 8},
        {"relative_attention_max_distance": 20, "relative_attention_num_buckets": 8},
        {"scale_output": False},
        {"relative_attention_per_layer": True},
    ):
        assert not torch.allclose(make(**fields)(SOURCE, TARGET).logits, plain), fields
    near, far = (
        make(relative_attention_num_buckets=8, relative_attention_max_distance=d)(SOURCE, TARGET).logits
        for d in (6, 60)
    )
    assert not torch.allclose(near, far)
    assert [make_config(num_decoder_layers=n).total_layers for n in (None, 1, 5)] == [4, 3, 7]


def test_dropout_acts_in_all_of_its_places_and_in_training_only():
    model = make(hidden_dropout=0.5)
    assert sum(isinstance(module, torch.nn.Dropout) for module in model.modules()) == 3 + 2 * 5
    model.train()
    assert not torch.allclose(model(SOURCE, TARGET).logits, model.eval()(SOURCE, TARGET).logits)
    attention = make(attention_dropout=0.5).train()
    assert not torch.allclose(attention(SOURCE, TARGET).logits, make()(SOURCE, TARGET).logits)


def test_scores_and_logits_start_as_small_as_those_of_a_scaled_model():
    fields = dict(hidden_size=256, num_attention_heads=4, head_dim=64, init_method_std=0.02, vocab_size=512)
    model = make(**fields)
    ids = torch.arange(512).reshape(2, 256)
    logits = model(ids, ids).logits.detach()
    assert logits.std() == pytest.approx(0.02 * 16, rel=0.3)  # std * sqrt(hidden)
    query = model.layers["0"].attention.query.weight.detach().std()
    assert query == pytest.approx(0.02 / 8, rel=0.1)
    outputs = [model.get_parameter(f"layers.{n}.mlp.down.weight").detach().std() for n in (0, 2)]
    assert outputs[0] == pytest.approx(0.02 / 2, rel=0.1)  # two layers of the encoder, two outputs each
    assert outputs[1] == pytest.approx(0.02 / 3, rel=0.1)  # three of the decoder, three outputs each


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "encoder"}, "architecture is 'encoder': choose one of decoder, encoder_decoder."),
        ({"num_experts": 4}, "num_experts is 4: an encoder-decoder does not have it"),
        ({"position_embedding": "rotary"}, "position_embedding is 'rotary': an encoder-decoder's are"),
        ({"architecture": "decoder"}, "num_decoder_layers is 3: it says nothing without architecture"),
        ({"architecture": "decoder"}, "position_embedding is 'relative': a decoder by itself has none"),
        ({"relative_attention_num_buckets": 5}, "it must be even and at least 4"),
        ({"relative_attention_max_distance": 16}, "it must be more than half of"),
        ({"pad_token_id": 61}, "pad_token_id is 61: it must be one of the 61 tokens."),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        make_config(**fields)

"""Encoder-decoders laid out: which rank holds what, dropout, recomputation (parity: cases/)."""

import torch
from tests.parallel.encoder_workers import dropped_places, gradients_with_dropout, names_of_stages
from tests.parallel.parity import T5

from mtnlg.config import MegatronModelConfig, TrainingConfig
from mtnlg.model import MegatronEncoderDecoder

ONE = {"data_parallel_size": 1}


def test_every_weight_is_on_one_stage(ranks):
    layout = {**ONE, "pipeline_parallel_size": 2, "pipeline_layout": [2, 3]}
    stages = [name for rank in ranks.run(2, names_of_stages, layout) for name in rank]
    with torch.device("meta"):
        whole = MegatronEncoderDecoder(MegatronModelConfig(**T5, tie_word_embeddings=False))
    assert sorted(name for stage in stages for name in stage) == sorted(
        name for name, _ in whole.named_parameters()
    )
    first, second = stages
    assert "encoder_positions.buckets.weight" in first and "decoder_positions.buckets.weight" in first
    assert "encoder_end.norm.weight" in second and "layers.2.attention.query.weight" in second


def test_ranks_drop_the_same_of_the_stream_and_other_columns(ranks):
    layout = {**ONE, "tensor_parallel_size": 2, "sequence_parallel": False}
    one, other = ranks.run(2, dropped_places, layout)
    assert one["stream"] == other["stream"]
    assert one["mlp"] != other["mlp"]


def test_recomputation_repeats_dropout():
    kinds = [
        TrainingConfig(activation_recomputation="selective"),
        TrainingConfig(activation_recomputation="full"),
        TrainingConfig(
            activation_recomputation="operators",
            recomputed_operators=["attention", "normalization", "activation", "linear"],
        ),
    ]
    plain, *others = gradients_with_dropout(ONE, [TrainingConfig(), *kinds])
    for other in others:
        assert all(torch.equal(plain[name], other[name]) for name in plain)

"""What cannot be divided or learned is refused before any process starts."""

import pytest

from mtnlg.config import BlendEntry, ConfigError, DataConfig, LayoutConfig, MegatronModelConfig, RunConfig
from mtnlg.config.division import layers_of_stages
from mtnlg.config.objective import ObjectiveConfig

T5 = dict(
    architecture="encoder_decoder",
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=3,
    num_decoder_layers=5,
    num_attention_heads=2,
    position_embedding="relative",
)
SPANS = ObjectiveConfig("span_corruption")


def run(objective=SPANS, model=None, length=64, **layout) -> RunConfig:
    data = DataConfig([BlendEntry("tokens")], sequence_length=length, objective=objective)
    config = MegatronModelConfig(**(T5 if model is None else model))
    return RunConfig(model=config, data=data, layout=LayoutConfig(**layout))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": ObjectiveConfig()}, "reads one text and writes another; choose span_corruption"),
        ({"length": 2}, "not even two tokens"),
        ({"context_parallel_size": 2}, "positions need a rank to have the whole sequence"),
        ({"context_parallel_size": 2, "model": {}}, "lets tokens see what follows them"),
        ({"model": {}, "objective": ObjectiveConfig("ul2", target_length=9)}, "a decoder reads input and"),
        ({"model": {}, "objective": ObjectiveConfig(target_length=9)}, "a decoder reads input and"),
        ({"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}, "go back through one; use gpipe"),
        ({"pipeline_parallel_size": 2, "pipeline_layout": [8, 0]}, "needs a layer of the decoder"),
        ({"pipeline_parallel_size": 9}, r"num_hidden_layers \+ num_decoder_layers \(8\)"),
        (
            {"tensor_parallel_size": 2, "objective": ObjectiveConfig("ul2", target_length=33)},
            r"data\.objective\.target_length is 33: .* divisible by layout\.tensor_parallel_size \(2\)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        run(**settings)


def test_encoder_and_decoder_are_divided_over_stages():
    config = run(pipeline_parallel_size=4, pipeline_layout=[2, 2, 2, 2])
    assert [list(part) for part in layers_of_stages(config.model, config.layout)] == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip
    balanced = layers_of_stages(config.model, LayoutConfig(pipeline_parallel_size=2))
    costs = [sum(map(config.model.num_parameters_of_layer, part)) for part in balanced]
    assert sum(map(len, balanced)) == 8
    assert max(costs) < 0.6 * sum(costs)


def test_conversations_need_no_objective():
    assert RunConfig(model=MegatronModelConfig(**T5)).data.objective.is_causal

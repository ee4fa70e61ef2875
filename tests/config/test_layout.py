import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig, layout_problems
from mtnlg.config.division import layers_of_stages

MODEL = MegatronModelConfig(vocab_size=101, hidden_size=48, num_hidden_layers=5, num_attention_heads=6)


def test_out_of_range_sizes_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LayoutConfig(tensor_parallel_size=0, pipeline_parallel_size=-1, pipeline_schedule="zigzag")
    assert len(caught.value.problems) == 3
    assert "choose one of gpipe, 1f1b" in str(caught.value)


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    layout = LayoutConfig(tensor_parallel_size=4, pipeline_parallel_size=6)
    model = MegatronModelConfig(
        vocab_size=3, hidden_size=48, num_hidden_layers=5, num_attention_heads=6, intermediate_size=50
    )
    problems = layout_problems(layout, model, sequence_length=30, micro_batches=2)
    named = ["num_attention_heads", "intermediate_size", "num_key_value_heads", "vocabulary"]
    named += ["data.sequence_length is 30", "more stages", "micro-batches"]
    assert len(problems) == len(named)
    for name, problem in zip(named, problems):
        assert name in problem


@pytest.mark.parametrize(
    ("layout", "sequence", "micro_batches"),
    [
        (LayoutConfig(tensor_parallel_size=3, pipeline_parallel_size=5), 30, 5),
        (LayoutConfig(tensor_parallel_size=2, sequence_parallel=False), 31, 1),
        (LayoutConfig(pipeline_parallel_size=4, pipeline_schedule="gpipe"), 31, 2),
        (LayoutConfig(data_parallel_size=7), 31, 1),
        (LayoutConfig(tensor_parallel_size=6), 6, 1),
    ],
)
def test_what_fits_has_no_problems(layout: LayoutConfig, sequence: int, micro_batches: int) -> None:
    assert layout_problems(layout, MODEL, sequence, micro_batches) == []


def test_every_rank_holds_some_of_the_vocabulary() -> None:
    layout = LayoutConfig(tensor_parallel_size=4)
    fields = dict(hidden_size=48, num_hidden_layers=5, num_attention_heads=4)
    nine, ten = (MegatronModelConfig(vocab_size=size, **fields) for size in (9, 10))
    assert "none of the 9 vocabulary" in layout_problems(layout, nine, 8, 1)[0]  # 3, 3, 3, 0
    assert layout_problems(layout, ten, 8, 1) == []  # 3, 3, 3, 1


def test_key_and_value_heads_divide_or_are_divided() -> None:
    fields = dict(vocab_size=101, hidden_size=96, num_hidden_layers=5, num_attention_heads=12)

    def problems(heads: int, tensor: int) -> list[str]:
        model = MegatronModelConfig(num_key_value_heads=heads, **fields)
        return layout_problems(LayoutConfig(tensor_parallel_size=tensor), model, 24, 1)

    assert all(problems(heads, 4) == [] for heads in (12, 4, 2, 1))
    (problem,) = problems(3, 4)
    assert "model.num_key_value_heads (3) or be a multiple of it" in problem


def counts(model: MegatronModelConfig, stages: int) -> list[int]:
    return [len(layers) for layers in layers_of_stages(model, LayoutConfig(pipeline_parallel_size=stages))]


def test_ends_count_as_work_where_the_config_says_so() -> None:
    fields = dict(vocab_size=50000, hidden_size=64, num_hidden_layers=140, num_attention_heads=4)

    def division(first: bool, last: bool) -> list[int]:
        return counts(MegatronModelConfig(**fields, pre_process_first=first, post_process_last=last), 4)

    assert division(False, False) == [35, 35, 35, 35]
    first_only, last_only = division(True, False), division(False, True)
    assert first_only[0] < 35 and first_only[1:] == sorted(first_only[1:])
    assert last_only[-1] < 35
    both = division(True, True)
    assert both[0] == both[-1] < both[1]


def test_mt_nlg_divides_as_it_was_trained() -> None:
    assert counts(MegatronModelConfig.from_preset("mt-nlg-530b"), 35) == [3] * 35


@given(layers=st.integers(1, 60), stages=st.integers(1, 12), vocab=st.integers(1, 20000))
def test_every_layer_runs_once_in_order_and_work_is_even(layers: int, stages: int, vocab: int) -> None:
    stages = min(stages, layers)
    model = MegatronModelConfig(
        vocab_size=vocab, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2
    )
    division = layers_of_stages(model, LayoutConfig(pipeline_parallel_size=stages))
    assert [index for part in division for index in part] == list(range(layers))
    assert all(len(part) >= 1 for part in division)
    end = model.vocab_size * model.hidden_size / model.num_parameters_per_layer
    work = [float(len(part)) for part in division]
    work[0] += end
    work[-1] += end
    busiest = max(range(stages), key=work.__getitem__)
    if len(division[busiest]) > 1:  # moving one of its layers elsewhere would help nobody
        assert work[busiest] <= min(work) + 1 + 1e-9

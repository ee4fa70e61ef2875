import pytest

from mtnlg.config import LayoutConfig, MegatronModelConfig, layout_problems

MODEL = MegatronModelConfig(vocab_size=101, hidden_size=48, num_hidden_layers=5, num_attention_heads=12)


def problems(sequence_length: int, **fields: object) -> list[str]:
    return layout_problems(LayoutConfig(**fields), MODEL, sequence_length, micro_batches=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("multiple", "length", "fields"),
    [
        (8, 12, dict(context_parallel_size=4)),
        (4, 14, dict(context_parallel_size=4, context_parallel_method="all_to_all")),
        (16, 8, dict(context_parallel_size=4, tensor_parallel_size=4)),
        (24, 8, dict(context_parallel_size=4, tensor_parallel_size=3)),
        (8, 4, dict(context_parallel_size=4, tensor_parallel_size=4, sequence_parallel=False)),
        (6, 4, dict(context_parallel_size=3, context_parallel_method="all_to_all", tensor_parallel_size=2)),
    ],
)
def test_every_rank_gets_as_many_tokens(multiple: int, length: int, fields: dict[str, object]) -> None:
    assert problems(multiple, **fields) == []
    found = " ".join(problems(length, **fields))
    assert f"data.sequence_length is {length}" in found
    assert f"multiple of {multiple}." in found


def test_all_to_all_needs_heads_for_every_rank_and_names_the_way_out() -> None:
    sizes = dict(context_parallel_size=6, tensor_parallel_size=4, sequence_parallel=False)
    (found,) = problems(24, **sizes, context_parallel_method="all_to_all")
    assert "each rank has 3" in found
    assert "context_parallel_method: ring" in found
    assert problems(24, **sizes) == []

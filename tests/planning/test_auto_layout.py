"""``layout: auto``: known cases, never an invalid layout, and the way from a recipe to a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtnlg.cli import main as cli
from mtnlg.config import (
    BatchConfig,
    ConfigError,
    LayoutConfig,
    MegatronModelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    layout_problems,
)
from mtnlg.config.load import load_run_config
from mtnlg.planning import choose_layout, memory_of_rank, resolve_auto_layout
from mtnlg.planning.auto_layout import USABLE_SHARE
from mtnlg.training import train

A100 = 80e9
BF16 = PrecisionConfig(dtype="bf16")
GPT_22B = MegatronModelConfig(
    vocab_size=51200,
    hidden_size=6144,
    num_hidden_layers=48,
    num_attention_heads=64,
    max_position_embeddings=2048,
)


def sizes(layout: LayoutConfig) -> tuple[int, ...]:
    return (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size or 0,
    )


@pytest.mark.parametrize(
    ("model", "batch", "devices", "expected"),
    [
        # The tensor and pipeline sizes that Megatron and MT-NLG were trained with, on the devices of one
        # replica (arXiv 2201.11990, 2104.04473 table 1, 2205.05198 table 3).
        ("mt-nlg-530b", BatchConfig(1, 1920), 280, (8, 35, 1, 1)),
        ("gpt3-175b", BatchConfig(1, 64), 64, (8, 8, 1, 1)),
        ("megatron-1t", BatchConfig(1, 512), 512, (8, 64, 1, 1)),
        (GPT_22B, BatchConfig(4, 4), 8, (8, 1, 1, 1)),
        # More devices hold less of the optimizer each, and the model is divided less.
        ("mt-nlg-530b", BatchConfig(1, 1920), 2240, (8, 14, 1, 20)),
        ("gpt3-1.3b", BatchConfig(1, 512), 8, (1, 1, 1, 8)),
        ("gpt3-1.3b", BatchConfig(1, 512), 1, (1, 1, 1, 1)),
    ],
)
def test_known_cases(model: Any, batch: BatchConfig, devices: int, expected: tuple[int, ...]) -> None:
    model = MegatronModelConfig.from_preset(model) if isinstance(model, str) else model
    layout, reasons = choose_layout(model, 2048, batch, devices, 8, A100, BF16)
    assert sizes(layout) == expected
    assert layout.data_parallel_sharding == "zero1"
    text = "\n".join(reasons)
    assert f"{devices:,} device" in text
    assert f"data_parallel_size {expected[3]}" in text
    assert ("tensor_parallel_size 8: " in text) == (expected[0] > 1)
    assert ("stages idle" in text) == (expected[1] > 1)


def test_a_long_sequence_is_divided_when_tensor_parallelism_does_not_make_it_fit() -> None:
    model = MegatronModelConfig(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=2, max_position_embeddings=2**17
    )
    layout, reasons = choose_layout(model, 2**17, BatchConfig(1, 8), 8, 8, A100, BF16)
    assert layout.context_parallel_size > 1
    assert "a sequence's activations do not fit" in "\n".join(reasons)


def test_devices_that_the_batch_cannot_use_stay_idle_unless_a_launcher_started_them() -> None:
    tiny = MegatronModelConfig(vocab_size=10, hidden_size=6, num_hidden_layers=1, num_attention_heads=3)
    task = (tiny, 7, BatchConfig(1, 2), 7, 7, A100)
    layout, reasons = choose_layout(*task)
    assert sizes(layout) == (1, 1, 1, 2)
    assert "5 of 7 devices stay idle" in reasons[-1]
    with pytest.raises(ConfigError, match="finds no layout of 7 devices that divides"):
        choose_layout(*task, may_leave_devices_idle=False)


def test_what_cannot_fit_is_said_with_what_it_would_need() -> None:
    model = MegatronModelConfig.from_preset("gpt3-1.3b")
    with pytest.raises(
        ConfigError, match=r"would need .* GB a device, and 7.2 GB can be used; set training"
    ):
        choose_layout(model, 2048, BatchConfig(1, 8), 1, 1, 8e9, BF16)
    task = (model, 2048, BatchConfig(16, 16), 1, 1, 40e9, BF16)
    with pytest.raises(ConfigError):
        choose_layout(*task)
    assert sizes(choose_layout(*task, TrainingConfig(activation_recomputation="full"))[0]) == (1, 1, 1, 1)


def test_memory_of_one_process_is_sixteen_bytes_a_parameter_and_the_paper_s_activations() -> None:
    need = memory_of_rank(LayoutConfig(), GPT_22B, 2048, 4, 1, PrecisionConfig(), TrainingConfig())
    assert need.weights + need.gradients + need.optimizer == 16 * GPT_22B.num_parameters
    half = memory_of_rank(LayoutConfig(tensor_parallel_size=8), GPT_22B, 2048, 4, 1, BF16, TrainingConfig())
    assert half.activations == 32 * 2048 * 4 * 6144 * 48 / 8  # sbh(34)/t a layer without dropout's masks


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_chosen_layout_is_valid_and_fits(data: st.DataObject) -> None:
    draw = data.draw
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    groups = draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0]))
    model = MegatronModelConfig(
        vocab_size=draw(st.sampled_from([7, 64, 1000])),
        hidden_size=heads * draw(st.sampled_from([8, 64])),
        num_hidden_layers=draw(st.integers(1, 13)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        tie_word_embeddings=draw(st.booleans()),
    )
    sequence = draw(st.sampled_from([7, 64, 96, 4096]))
    micro = draw(st.integers(1, 3))
    batch = BatchConfig(micro, micro * draw(st.integers(1, 16)))
    devices, per_node = draw(
        st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 8), (16, 4), (12, 4)])
    )
    memory = 10 ** draw(st.floats(5.0, 9.0))
    exact = draw(st.booleans())
    precision = PrecisionConfig(dtype=draw(st.sampled_from(["float32", "bf16"])))
    task = (model, sequence, batch, devices, per_node, memory, precision)
    try:
        layout, reasons = choose_layout(*task, may_leave_devices_idle=not exact)
    except ConfigError:
        assume(False)
    assert layout.num_ranks == devices or (not exact and layout.num_ranks < devices)
    assert per_node % layout.tensor_parallel_size == 0
    replicas = layout.data_parallel_size or 0
    assert batch.global_batch_size % (micro * replicas) == 0
    micro_batches = batch.global_batch_size // (micro * replicas)
    assert layout_problems(layout, model, sequence, micro_batches) == []
    need = memory_of_rank(layout, model, sequence, micro, micro_batches, precision, TrainingConfig())
    assert math.isfinite(need.total)
    assert need.total <= USABLE_SHARE * memory
    assert reasons


def test_auto_is_read_from_a_recipe_and_from_the_command_line(tmp_path: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("layout: auto\n")
    assert load_run_config(recipe).layout == LayoutConfig(auto=True)
    recipe.write_text("layout: {tensor_parallel_size: 2}\n")
    assert load_run_config(recipe, ["--layout=auto"]).layout == LayoutConfig(auto=True)
    config = load_run_config(None, ["--layout", "auto", "--layout.data_parallel_sharding=zero3"])
    assert config.layout == LayoutConfig(auto=True, data_parallel_sharding="zero3")
    with pytest.raises(ConfigError, match=r"with layout\.auto it is chosen"):
        load_run_config(None, ["--layout=auto", "--layout.tensor_parallel_size=2"])


def test_one_rank_on_a_cpu_and_as_many_as_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MegatronModelConfig(vocab_size=64, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    config = RunConfig(
        model=model,
        layout=LayoutConfig(auto=True),
        training=TrainingConfig(device="cpu"),
        batch=BatchConfig(1, 8),
    )
    resolved, reasons = resolve_auto_layout(config)
    assert resolved.layout == LayoutConfig(data_parallel_size=1)
    assert reasons[0].startswith("1 device with")
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert resolve_auto_layout(config)[0].layout == LayoutConfig(data_parallel_size=4)
    assert resolve_auto_layout(resolved) == (resolved, [])


def test_the_command_prints_why_and_the_config_it_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "recipes/laptop.yaml", "--layout=auto", "--training.device=cpu", "--print-config"]
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    assert "data_parallel_size 1: what is left." in printed.err
    assert "auto: false" in printed.out
    assert "data_parallel_size: 1" in printed.out


def test_training_with_an_open_choice_says_how_to_make_it(tmp_path: Any) -> None:
    config = RunConfig(run_dir=str(tmp_path), layout=LayoutConfig(auto=True))
    with pytest.raises(ConfigError, match="resolve_auto_layout"):
        train(config)

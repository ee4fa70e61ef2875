"""No setting is silently ignored: each changes what a run does, here or in the test that is named."""

from __future__ import annotations

import ast
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.training.helpers import Recorder, metrics_lines, small_config, train_here

from mtnlg.config import LayoutConfig, MegatronModelConfig, RunConfig
from mtnlg.config.check import setting_names
from mtnlg.parallel import ParallelModel, build_mesh
from mtnlg.parallel import mesh as mesh_module
from mtnlg.training import checkpoint_files, loop
from mtnlg.training.device import choose_device

TESTS = Path(__file__).resolve().parents[1]
RAMP = {"batch.ramp_start": 4, "batch.ramp_increment": 2, "batch.ramp_tokens": 300}
MUON = {"optimizer.name": "muon"}
WSD = {"schedule.name": "wsd"}
EACH_STEP = {"checkpoint.interval_steps": 1, "checkpoint.keep_last": 1}

# setting: (another value, other settings that it takes to matter)
CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "seed": (5, {}),
    "data.split": ("5,5,0", {}),
    "data.sequence_length": (8, {}),
    "data.reset_at_document_boundaries": (True, {}),
    "data.seed": (9, {}),
    "optimizer.name": ("muon", {}),
    "optimizer.learning_rate": (0.01, {}),
    "optimizer.muon_learning_rate": (0.1, MUON),
    "optimizer.muon_momentum": (0.5, MUON),
    "optimizer.beta1": (0.5, {}),
    "optimizer.beta2": (0.5, {}),
    "optimizer.epsilon": (0.01, {}),
    "optimizer.weight_decay": (0.9, {}),
    "optimizer.clip_grad_norm": (0.001, {}),
    "schedule.name": ("linear", {}),
    "schedule.warmup_tokens": (300, {}),
    "schedule.decay_tokens": (300, {}),
    "schedule.wsd_decay_share": (0.9, WSD),
    "schedule.min_learning_rate_ratio": (0.7, {}),
    "batch.micro_batch_size": (4, {}),
    "batch.global_batch_size": (4, {}),
    "batch.ramp_start": (2, RAMP),
    "batch.ramp_increment": (4, RAMP),
    "batch.ramp_tokens": (100, RAMP),
    "precision.dtype": ("bf16", {}),
    "stop.tokens": (200, {}),
    "stop.steps": (3, {}),
    "evaluation.interval_steps": (1, {}),
    "evaluation.num_batches": (1, {}),
    "checkpoint.interval_steps": (1, {}),
    "checkpoint.keep_last": (3, EACH_STEP),
    "checkpoint.keep_every": (2, EACH_STEP),
    "logging.interval_steps": (2, {}),
    "training.num_threads": (2, {}),
    "training.max_skipped_steps": (3, {}),
    "training.deterministic": (True, {}),
}

STEPS, STOPPING, STREAM = "training/test_step.py", "training/test_stopping.py", "tokens/test_stream.py"
PREPARE, DATA = "training/test_prepare.py", "parallel/test_data.py"
PIPELINE = "parallel/test_pipeline.py"
FAULTS = "parallel/test_faults.py::test_every_token_is_trained_on_once_in_any_layout_and_after_changing_it"
RECOMPUTE = "parallel/test_recompute.py"
DOCUMENTS, AUTO = "tokens/test_documents.py", "planning/test_auto_layout.py"
ASYNC, BACKGROUND = "parallel/test_async_tensor.py", "training/test_async_checkpoints.py"
OBJECTIVE, DENOISING = "training/test_special_tokens.py", "tokens/test_denoising.py"
LENGTHS, HERE = "config/test_objective.py", "config/test_every_setting.py"
PROVED_BY = {
    "run_dir": f"{PREPARE}::test_prepare_makes_tokenizer_token_files_and_config",
    "preset": "config/test_load.py::test_preset_expands_and_written_fields_win",
    "tokenizer.path": f"{PREPARE}::test_token_files_need_their_tokenizer",
    "tokenizer.vocab_size": "config/test_load.py::test_an_open_vocab_size_is_the_tokenizers",
    "tokenizer.han_characters": f"{PREPARE}::test_tokens_of_a_prepared_run_hold_so_many_han_characters",
    "tokenizer.sets_vocab_size": "config/test_load.py::test_an_open_vocab_size_is_the_tokenizers",
    "data.blend": f"{STREAM}::test_corpora_take_turns_by_weight",
    "data.sources": f"{PREPARE}::test_changed_source_is_encoded_anew_until_the_run_has_begun",
    "data.encoding_errors": f"{DOCUMENTS}::test_wrong_encodings_are_named_and_can_be_passed_over",
    "data.cache_dir": "tokens/test_index_cache.py::test_index_goes_to_the_cache_folder",
    "data.objective.name": f"{OBJECTIVE}::test_a_decoder_learns_by_an_objective_and_goes_on",
    "data.objective.noise_density": f"{DENOISING}::test_a_changed_objective_is_refused",
    "data.objective.mean_span_length": f"{LENGTHS}::test_lengths_are_those_of_t5",
    "data.objective.denoisers": f"{DENOISING}::test_denoisers_are_drawn_by_weight_and_say_which",
    "data.objective.target_length": f"{LENGTHS}::test_a_sample_has_room_and_no_token_more",
    "data.objective.sentinel_ids": f"{OBJECTIVE}::test_a_trained_tokenizer_has_sentinels_and_modes",
    "data.objective.end_id": f"{OBJECTIVE}::test_a_trained_tokenizer_has_sentinels_and_modes",
    "data.objective.padding_id": f"{OBJECTIVE}::test_a_trained_tokenizer_has_sentinels_and_modes",
    "data.objective.start_id": f"{OBJECTIVE}::test_an_encoder_decoder_takes_the_ends_of_its_tokenizer",
    "data.objective.mode_ids": f"{OBJECTIVE}::test_a_tokenizer_without_them_is_refused_with_a_way_out",
    "layout.auto": f"{AUTO}::test_auto_is_read_from_a_recipe_and_from_the_command_line",
    "layout.tensor_parallel_size": FAULTS,
    "layout.pipeline_parallel_size": FAULTS,
    "layout.data_parallel_size": FAULTS,
    "layout.context_parallel_size": FAULTS,
    "layout.expert_parallel_size": f"{HERE}::test_ranks_share_experts",
    "layout.sequence_parallel": f"{RECOMPUTE}::test_measured_bytes_are_those_of_the_formula",
    "layout.async_tensor_parallel": f"{ASYNC}::test_what_cannot_be_is_refused_with_its_reason",
    "layout.pipeline_schedule": "config/test_division.py::test_stages_of_a_rank_follow_from_the_layout",
    "layout.stages_per_rank": f"{PIPELINE}::test_what_a_schedule_cannot_run_is_refused_with_a_way_out",
    "layout.pipeline_layout": "config/test_division.py::test_three_ways_to_divide",
    "layout.data_parallel_sharding": f"{DATA}::test_each_rank_holds_what_the_name_says",
    "layout.data_parallel_shard_size": f"{DATA}::test_hybrid_shards_in_groups_and_sums_over_them",
    "layout.context_parallel_method": "parallel/test_context.py::test_formulas_are_what_is_kept_and_sent",
    "layout.cpu_offload": "parallel/test_offload.py::test_a_run_on_the_cpu_has_nothing_to_offload",
    "layout.backend": f"{HERE}::test_the_backend_is_the_one_asked_for",
    "precision.reduce_dtype": f"{DATA}::test_gradients_travel_in_bf16_and_add_up_in_float32",
    "precision.fp8": "parallel/test_precision.py::test_8_bit_products_are_refused_where_they_cannot_run",
    "precision.initial_loss_scale": f"{STEPS}::test_loss_scale_doubles_and_halves",
    "precision.loss_scale_window": f"{STEPS}::test_loss_scale_doubles_and_halves",
    "precision.min_loss_scale": f"{STEPS}::test_loss_scale_gives_up_at_its_floor",
    "stop.minutes": f"{STOPPING}::test_minutes_end_a_real_run_and_its_decay",
    "stop.patience": f"{STOPPING}::test_convergence_ends_a_real_run",
    "stop.margin": f"{STOPPING}::test_convergence_counts_evaluations_without_improvement",
    "evaluation.prompts": f"{PREPARE}::test_train_goes_the_whole_way_and_on",
    "evaluation.sample_tokens": f"{PREPARE}::test_train_goes_the_whole_way_and_on",
    "checkpoint.interval_minutes": "training/test_checkpoints.py::test_checkpoints_by_minutes",
    "checkpoint.asynchronous": f"{BACKGROUND}::test_copy_is_made_only_where_training_goes_on",
    "logging.tensorboard": "training/test_metrics.py::test_tensorboard_gets_the_same_numbers",
    "training.device": f"{HERE}::test_a_device_that_is_not_there_is_refused",
    "training.compile": "parallel/test_recompute.py::test_what_cannot_be_done_is_refused",
    "training.activation_recomputation": f"{RECOMPUTE}::test_measured_bytes_are_those_of_the_formula",
    "training.recomputed_operators": f"{RECOMPUTE}::test_measured_bytes_are_those_of_the_formula",
    "training.activation_memory_budget": f"{RECOMPUTE}::test_budget_is_kept_and_made_use_of",
    "training.activation_offload": f"{RECOMPUTE}::test_offload_is_refused_on_a_cpu",
}


def test_every_setting_has_its_proof() -> None:
    """The model's fields have theirs in tests/model/test_config_fields.py, tuning's in tests/tuning."""
    settings = {name for name in setting_names(RunConfig) if not name.startswith(("model.", "tuning."))}
    assert settings - set(CHANGED) - set(PROVED_BY) == set(), "show that the new setting does something"
    assert set(CHANGED) & set(PROVED_BY) == set()
    assert (set(CHANGED) | set(PROVED_BY)) - settings == set(), "these settings are gone"


@pytest.mark.parametrize("setting", PROVED_BY)
def test_the_proof_is_there_and_speaks_of_the_setting(setting: str) -> None:
    path, name = PROVED_BY[setting].split("::")
    text = (TESTS / path).read_text(encoding="utf-8")
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in functions
    assert setting.split(".")[-1] in text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs with the settings of CHANGED's second part do."""
    known: dict[str, dict[str, Any]] = {}

    def find(others: dict[str, Any]) -> dict[str, Any]:
        if repr(others) not in known:
            known[repr(others)] = observe(tmp_path_factory.mktemp("base"), others)
        return known[repr(others)]

    return find


@pytest.mark.parametrize("setting", CHANGED)
def test_a_changed_setting_changes_the_run(base: Any, tmp_path: Path, setting: str) -> None:
    value, others = CHANGED[setting]
    assert observe(tmp_path, {**others, setting: value}) != base(others)


def observe(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run of four steps does: whatever a setting might change, but for times."""
    config = changed(small_config(folder), {"stop.steps": 4, "schedule.name": "cosine", **settings})
    model = MegatronModelConfig(
        vocab_size=37, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
    )
    recorder, micro_batches, trainers = Recorder(), [], []
    forward_backward, trainer_class = ParallelModel.forward_backward, loop.Trainer

    def noting(self: ParallelModel, batches: Any, *args: Any, **options: Any) -> Any:
        micro_batches.append([zlib.crc32(batch.input_ids.numpy().tobytes()) for batch in batches])
        micro_batches.append([batch.document_ids is not None for batch in batches])
        return forward_backward(self, batches, *args, **options)

    def making(*args: Any, **options: Any) -> Any:
        trainers.append(trainer_class(*args, **options))
        return trainers[0]

    threads = torch.get_num_threads()
    try:
        with (
            mock.patch.object(ParallelModel, "forward_backward", noting),
            mock.patch.object(loop, "Trainer", making),
        ):
            train_here(replace(config, model=model), recorder)
        return {
            "micro-batches": micro_batches,
            "steps": [(step.step, step.learning_rate, step.loss) for step in recorder.steps],
            "lines": [line["step"] for line in metrics_lines(config)],
            "validations": [(validation.step, validation.loss) for validation in recorder.validations],
            "checkpoints": [path.name for path in checkpoint_files.list_checkpoints(config.run_dir)],
            "weights": {n: w.sum().item() for n, w in trainers[0].model.state_dict().items()},
            "patience": trainers[0].step.max_skipped,
            "torch": (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        }
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """``config`` with some dotted settings replaced, all at once."""
    sections: dict[str, dict[str, Any]] = {}
    plain = {}
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        if section:
            sections.setdefault(section, {})[field] = value
        else:
            plain[field] = value
    built = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return replace(config, **built, **plain)


def test_the_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def init_process_group(backend: str, **_: Any) -> None:
        asked.append(backend)
        raise InterruptedError

    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh_module.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(mesh_module.dist, "init_process_group", init_process_group)
    for backend in ("nccl", None):
        with pytest.raises(InterruptedError):
            build_mesh(LayoutConfig(data_parallel_size=2, backend=backend))
    assert asked == ["nccl", "gloo"]


def test_ranks_share_experts() -> None:
    """expert_parallel_size: the mesh that experts are held on has an axis of that size."""
    layout = LayoutConfig(data_parallel_size=4, expert_parallel_size=2)
    assert mesh_module._views(layout)[mesh_module.EXPERT_AXES] == (1, 1, 2, 2, 1)
    assert mesh_module.EXPERT_AXES not in mesh_module._views(LayoutConfig(data_parallel_size=4))


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """training.device"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        choose_device("cuda")

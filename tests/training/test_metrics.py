"""Metrics: FLOPs by the published formulas, peaks, files, rates."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.parallel.parity import T5
from tests.training.helpers import Recorder, metrics_lines, small_config, train_here

from mtnlg.config import LoggingConfig, MegatronModelConfig, StopConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import put_adapter
from mtnlg.model.loss import summed_cross_entropy
from mtnlg.model.virtual_tokens import rows_with_virtual
from mtnlg.training import meter, metrics, peak
from mtnlg.training.flops import forward_flops, hardware_flops_per_token, model_flops_per_token

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MT_NLG = MegatronModelConfig.from_preset("mt-nlg-530b", vocab_size=51_200)


def paper_flops(batch: int, s: int, layers: int, h: int, vocab: int, recompute: bool) -> float:
    """Equation 3 of arXiv 2104.04473, and the same without recomputation."""
    if recompute:
        return 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    return 72 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))


def test_flops_equal_the_papers_formula():
    tokens = 1920 * 2048
    model = model_flops_per_token(MT_NLG, 2048) * tokens
    hardware = hardware_flops_per_token(MT_NLG, 2048, "full") * tokens
    assert model == pytest.approx(paper_flops(1920, 2048, 105, 20480, 51200, False), rel=1e-12)
    assert hardware == pytest.approx(paper_flops(1920, 2048, 105, 20480, 51200, True), rel=1e-12)


def test_mt_nlg_step_reaches_the_published_rate():
    """2,240 A100 in 60.1 s a step: 126 TFLOP/s each in hardware FLOPs, 30.2% MFU (arXiv 2204.02311)."""
    tokens, seconds, gpus = 1920 * 2048, 60.1, 2240
    hardware = hardware_flops_per_token(MT_NLG, 2048, "full") * tokens / seconds / gpus
    assert hardware == pytest.approx(126e12, rel=0.01)
    listed = peak.listed_gpu_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    mfu = model_flops_per_token(MT_NLG, 2048) * tokens / seconds / gpus / listed
    assert mfu == pytest.approx(0.302, abs=0.002)


def test_selective_recomputation_adds_attention_alone():
    forward = model_flops_per_token(MT_NLG, 2048) / 3
    added = hardware_flops_per_token(MT_NLG, 2048, "selective") / forward - 3.0
    assert added == pytest.approx(0.016, abs=0.001)  # of a forward pass: arXiv 2205.05198, MT-NLG


def test_recomputed_operators_add_their_products():
    h, s, layers = 20480, 2048, 105
    least = model_flops_per_token(MT_NLG, s)

    def added(*operators: str) -> float:
        return hardware_flops_per_token(MT_NLG, s, "operators", operators) - least

    assert added("normalization", "activation") == 0.0
    assert added("attention") == 4 * s * h * layers
    assert added("linear") == (4 * s * h + 2 * (3 + 4) * h * h) * layers  # Q, K, V and the MLP's first


def test_flops_of_grouped_queries_and_gates_are_those_of_their_matrices():
    config = MegatronModelConfig.from_preset("llama3-8b")
    per_token = model_flops_per_token(config, 8192)
    matrices = config.num_parameters - config.vocab_size * config.hidden_size  # the embedding is looked up
    attention = 12 * 8192 * 4096 * 32
    assert per_token == pytest.approx(6 * matrices + attention, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51.2e12),
        ("NVIDIA A100-SXM4-40GB", 311.9e12, 19.5e12),
        ("NVIDIA L40S", 362.1e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", 65e12, 8.1e12),
    ],
)
def test_gpu_peaks_are_the_dense_ones(name, bf16, float32):
    assert peak.listed_gpu_peak(name, torch.bfloat16) == pytest.approx(bf16)
    assert peak.listed_gpu_peak(name, torch.float32) == pytest.approx(float32)


def test_longer_names_stand_before_shorter_ones():
    names = [row[0] for row in peak.GPU_PEAKS]
    for position, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:position]), name


def test_unknown_device_is_measured_once():
    assert peak.listed_gpu_peak("Unheard-of 9000", torch.bfloat16) is None
    first = peak.measured_peak("cpu", torch.float32, 1, 0.01)
    assert 1e8 < first < 1e15
    assert peak.measured_peak("cpu", torch.float32, 1, 0.01) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_listed_peak_is_near_what_this_gpu_does():
    listed = peak.listed_gpu_peak(torch.cuda.get_device_name(), torch.bfloat16)
    if listed is None:
        pytest.skip("this GPU is not in the table")
    assert 0.5 < peak.measured_peak("cuda", torch.bfloat16, 1) / listed < 1.0


def test_lines_hold_what_they_promise(tmp_path):
    config = small_config(tmp_path, logging=LoggingConfig(interval_steps=4))
    recorder = Recorder()
    train_here(config, recorder)
    lines = metrics_lines(config)
    assert [line["step"] for line in lines] == [4, 6]  # the rest is written at the end
    losses = [metrics.loss for metrics in recorder.steps]
    assert lines[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert lines[1]["loss"] == pytest.approx(sum(losses[4:]) / 2)
    keys = "tokens learning_rate gradient_norm tokens_per_second mfu hfu memory_bytes loss_scale seconds"
    for key in keys.split():
        assert lines[0][key] > 0, key
    rate = model_flops_per_token(config.model, 16) * lines[0]["tokens_per_second"]
    peaks = peak.measured_peak("cpu", torch.float32, 1)
    assert lines[0]["mfu"] == pytest.approx(rate / peaks)
    validation = metrics_lines(config, "validation")[0]
    assert validation["perplexity"] == pytest.approx(math.exp(validation["loss"]))


def test_a_peak_measured_on_a_busy_machine_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(meter, "peak_flops", lambda device, dtype: 1e3)  # next to nothing
    recorder = Recorder()
    config = small_config(tmp_path, logging=LoggingConfig(interval_steps=2))
    train_here(config, recorder)
    assert recorder.steps[0].mfu > 1.0
    assert all(line["mfu"] < 1.0 for line in metrics_lines(config))


def test_progress_and_eta_lead_to_the_end(tmp_path):
    recorder = Recorder()
    train_here(small_config(tmp_path), recorder)
    assert [round(m.progress * 6) for m in recorder.steps] == [1, 2, 3, 4, 5, 6]
    assert recorder.steps[0].eta_seconds is None
    assert recorder.steps[2].eta_seconds > 0 and recorder.steps[-1].eta_seconds == 0


def test_lines_of_lost_steps_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\nnonsense\n{"step": 2, "lo')
    metrics.drop_later_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_not_a_number_is_null_in_json():
    assert json.dumps(metrics.jsonable({"a": math.nan, "b": -math.inf, "c": 1.5})) == (
        '{"a": null, "b": null, "c": 1.5}'
    )


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(tmp_path, logging=LoggingConfig(interval_steps=2, tensorboard=True))
    train_here(replace(config, stop=StopConfig(steps=4)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics_lines(config)]
    assert written == expected
    assert [event.step for event in events.Scalars("validation/loss")] == [4]


def test_evaluation_hook_adds_to_the_metrics(tmp_path):
    from mtnlg.config import LayoutConfig
    from mtnlg.parallel import build_mesh
    from mtnlg.training import train_on_rank

    config, recorder = small_config(tmp_path), Recorder()
    mesh = build_mesh(LayoutConfig(data_parallel_size=1))
    train_on_rank(config, mesh, [recorder], evaluate=lambda model, step: {"bits_per_character": step / 2})
    assert recorder.validations[-1].extra == {"bits_per_character": 3.0}
    assert metrics_lines(config, "validation")[-1]["bits_per_character"] == 3.0


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2}, {"activation_function": "gelu"}])
def test_flops_of_an_encoder_decoder_are_those_that_torch_counts(fields: dict[str, object]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from mtnlg.model import MegatronEncoderDecoder

    config = MegatronModelConfig(**{**T5, "hidden_dropout": 0.1, **fields})  # type: ignore[arg-type]
    model = MegatronEncoderDecoder(config)
    # The fused kernel is not counted, so attention runs as plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 24, dtype=torch.long), torch.ones(2, 9, dtype=torch.long))
    forward = forward_flops(config, 24, 9)
    assert 48 * (forward.linear + forward.attention + forward.head) == counter.get_total_flops()
    executed = hardware_flops_per_token(config, 24, "full", target_length=9)
    assert executed == 4 * (forward.linear + forward.attention) + 3 * forward.head


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_flops_of_training_an_adapter_are_those_that_torch_counts(method: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = MegatronModelConfig(vocab_size=53, **SMALL)  # type: ignore[arg-type]
    model, adapter = MegatronLmDecoder(config), None
    if method != "full":
        targets = ["all-linear", "embedding.tokens", "head.output"]
        adapter = AdapterConfig(method=method, rank=3, target_modules=targets, num_virtual_tokens=5)
        put_adapter(model, adapter)
    ids = torch.ones(2, 24, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # As a run does: virtual tokens have logits, too.
        read = ids if adapter is None else rows_with_virtual(adapter, 53, ids)[0]
        MegatronLmDecoder.forward(model, read).logits.sum().backward()
    expected = 48 * model_flops_per_token(config, 24, adapter=adapter)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    again = hardware_flops_per_token(config, 24, "full", adapter=adapter)
    assert 1.2 < again * 48 / expected < 1.5


def test_a_frozen_head_has_no_weight_gradient() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden = torch.randn(1, 6, 8, requires_grad=True)
    counted = {}
    for is_frozen in (False, True):
        weight = torch.randn(11, 8, requires_grad=not is_frozen)
        with FlopCounterMode(display=False) as counter:
            summed_cross_entropy(hidden, weight, torch.ones(1, 6, dtype=torch.long)).backward()
        counted[is_frozen] = counter.get_total_flops()
        assert (weight.grad is None) == is_frozen and hidden.grad is not None
    assert counted == {False: 3 * 2 * 6 * 8 * 11, True: 2 * 2 * 6 * 8 * 11}

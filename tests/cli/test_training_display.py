import io

import pytest

from mtnlg.cli import training_display
from mtnlg.cli.training_display import TrainingDisplay, step_text
from mtnlg.training import RunStart, Sample, StepMetrics, TrainResult, ValidationMetrics

START = RunStart("runs/x", 4_790_000, 0, 2_000_000, "cpu", 1, 190e9)
RESULT = TrainResult("runs/x", 9, 900, 61.0, 2.0, 2.5, 2.5, "steps", 0, None)


def metrics(step, **changes):
    values = {
        "step": step,
        "tokens": step * 100,
        "loss": 3.21987,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "batch_size": 8,
        "tokens_per_second": 5123.0,
        "mfu": 0.756,
        "hfu": 0.756,
        "memory_bytes": 1,
        "loss_scale": 1.0,
        "skipped": False,
        "skipped_steps": 0,
        "seconds": float(step),
        "progress": step / 10,
        "eta_seconds": 75.0,
    }
    return StepMetrics(**{**values, **changes})


def test_a_step_in_one_line():
    expected = "step 7, loss 3.220, 5123 tokens/s, MFU 76%, 1 min 15 s left"
    assert step_text(metrics(7)) == expected
    assert step_text(metrics(7, eta_seconds=None, skipped_steps=2)).endswith("MFU 76%, 2 skipped")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_and_all_events(clock):
    stream = io.StringIO()
    display = TrainingDisplay(stream)
    display.on_start(START)
    for step in range(1, 10):
        clock[0] += 4.0
        display.on_step(metrics(step))
    display.on_validation(ValidationMetrics(9, 900, 2.5, 12.18, 64, True, 9.0, {"bits_per_byte": 1.5}))
    display.on_sample(Sample(9, "春天", "来了"))
    display.on_message("a step was skipped")
    display.on_end(RESULT)
    lines = stream.getvalue().splitlines()
    assert "4.79M parameters on cpu, peak 190 GFLOP/s, 2M tokens to go through" in lines[0]
    assert [line.split(",")[0] for line in lines[1:4]] == [" 10% step 1", " 40% step 4", " 70% step 7"]
    assert lines[4].strip() == "step 9: validation loss 2.5000, perplexity 12.18, bits per byte 1.5"
    assert "春天" in lines[5] and "来了" in lines[5]
    assert lines[6].strip() == "note: a step was skipped"
    assert lines[-1] == "stopped after 9 steps, 900 tokens, 1 min 01 s (steps)"


def test_going_on_is_said_with_the_step_and_the_ranks():
    stream = io.StringIO()
    TrainingDisplay(stream).on_start(RunStart("runs/x", 1000, 40, None, "cpu", 4, 1e9))
    assert stream.getvalue().startswith("going on from step 40")
    assert "(4 ranks)" in stream.getvalue()


def test_a_terminal_gets_a_bar_and_the_events_above_it():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    display = TrainingDisplay(stream, show_samples=False)
    display.on_start(START)
    display.on_step(metrics(5))
    display.on_message("[bold] is no markup here")
    display.on_sample(Sample(9, "春天", "来了"))
    display.on_end(RESULT)
    text = stream.getvalue()
    assert "[bold] is no markup here" in text
    assert "来了" not in text
    assert "stopped after 9 steps" in text


def test_a_display_can_be_made_in_another_process():
    import pickle

    assert isinstance(pickle.loads(pickle.dumps(TrainingDisplay))(), TrainingDisplay)

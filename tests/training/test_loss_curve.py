import json

import pytest

from mtnlg.config import DataError
from mtnlg.training.loss_curve import draw_loss_curve, read_losses


def write_metrics(folder):
    lines = [
        {"kind": "train", "step": 1, "tokens": 10, "loss": 3.0},
        {"kind": "train", "step": 2, "tokens": 20, "loss": None},
        {"kind": "validation", "step": 2, "tokens": 20, "loss": 2.5},
    ]
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_are_read_by_kind_without_the_missing_ones(tmp_path):
    write_metrics(tmp_path)
    assert read_losses(tmp_path) == {"train": [(10, 3.0)], "validation": [(20, 2.5)]}


def test_the_picture_is_a_png_in_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path)
    path = draw_loss_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_without_metrics_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(DataError, match="no metrics"):
        draw_loss_curve(tmp_path)

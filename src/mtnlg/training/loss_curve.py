"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from mtnlg.config import ConfigError, DataError


def read_losses(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """(tokens, loss) of each ``train`` and ``validation`` line of a run's ``metrics.jsonl``.

    Raises:
        DataError: the run has no metrics yet.
    """
    path = Path(run_dir) / "metrics.jsonl"
    losses: dict[str, list[tuple[int, float]]] = {"train": [], "validation": []}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values.get("loss") is not None:
                losses[values["kind"]].append((values["tokens"], values["loss"]))
    if not losses["train"]:
        raise DataError(f"{path}: there are no metrics to draw yet.")
    return losses


def draw_loss_curve(run_dir: str | Path, path: str | Path | None = None, title: str = "") -> Path:
    """Draw the training and validation loss of a run over the tokens it has seen.

    Args:
        run_dir: the run's folder.
        path: the PNG (or SVG) to write; ``None`` is ``loss.png`` in the run's folder.
        title: above the picture.

    Returns:
        The picture's path.

    Raises:
        ConfigError: the ``plot`` extra is not installed.
        DataError: the run has no metrics yet.
    """
    losses = read_losses(run_dir)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'mtnlg[plot]'.") from None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*losses["train"]), color="#7aa6d1", linewidth=1, label="training")
    if losses["validation"]:
        axes.plot(
            *zip(*losses["validation"]), color="#c0392b", marker="o", markersize=3, label="validation"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    target = Path(path) if path is not None else Path(run_dir) / "loss.png"
    figure.savefig(target)
    return target

"""What a tuning run does where nothing is written: the base's architecture, and rates for each method."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.tuning import METHODS
from mtnlg.training.model_files import open_model_files

# Peak rates of AdamW, for models of a billion parameters and more. Full tuning moves every weight a
# little; what begins at zero or beside the model has a longer way.
LEARNING_RATES = {"full": 5e-5, "lora": 2e-4, "prompt": 3e-2, "prefix": 1e-2}
LARGE = 1e9  # parameters
MOST_OF_SMALL = 20.0  # times the rate of large models
LONGEST_SAMPLE = 1024
EPOCHS = 3.0


def tuning_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The sections that lie under those of a tuning run.

    Args:
        values: the sections as written, whose ``tuning`` names the base; whatever is wrong with them is
            said by those who check them.

    Raises:
        CheckpointError: the base is not there.
    """
    tuning = values.get("tuning")
    tuning = tuning if isinstance(tuning, dict) else {}
    base, method = str(tuning.get("base") or ""), str(tuning.get("method") or "full")
    if not base or method not in METHODS:
        return {}
    model = open_model_files(base).config
    length = min(LONGEST_SAMPLE, model.max_position_embeddings - _virtual_tokens(tuning, method))
    sections: dict[str, Any] = {
        "run_dir": f"runs/{Path(base).name}-{method}",
        "model": asdict(model),
        "data": {"sequence_length": max(1, length)},
        "optimizer": {
            "learning_rate": default_rate(method, model.num_parameters),
            "weight_decay": 0.0,
            "beta2": 0.999,
        },
        "batch": {"micro_batch_size": 4, "global_batch_size": 16},
        "evaluation": {"interval_steps": 50, "num_batches": 0},
    }
    written = values.get("stop")
    sections["tuning"] = {}
    if tuning.get("epochs") is None and not written:
        sections["tuning"]["epochs"] = EPOCHS
    if model.has_encoder and method == "prompt":  # virtual tokens would see all examples of a sample
        sections["tuning"]["packing"] = False
    if not written:
        sections["stop"] = {"steps": 1}  # becomes those of the epochs
    return sections


def default_rate(method: str, num_parameters: int) -> float:
    """The peak learning rate of a method where none is written.

    Where the model's own matrices move (``full``, ``lora``), smaller models take more: by the square root
    of the size. Of a few million parameters it is careful still: ``benchmarks/tuning.py`` finds four times
    as much best where data is read once.
    """
    rate = LEARNING_RATES[method]
    if method in ("full", "lora"):
        rate *= min(MOST_OF_SMALL, math.sqrt(LARGE / min(LARGE, max(1, num_parameters))))
    return float(f"{rate:.1e}")


def _virtual_tokens(tuning: dict[str, Any], method: str) -> int:
    """Positions that samples leave to virtual tokens."""
    adapter = tuning.get("adapter")
    written = adapter.get("num_virtual_tokens") if isinstance(adapter, dict) else None
    if method not in ("prompt", "prefix"):
        return 0
    try:
        return int(AdapterConfig.num_virtual_tokens if written is None else written)
    except ValueError:
        return 0  # whoever checks it says so

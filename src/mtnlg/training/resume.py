"""What a checkpoint says of the run besides its tensors, and whether a config may go on from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mtnlg.config import CheckpointError, MegatronModelConfig, RunConfig

STATE_FORMAT = 1

# Another value makes other weights, other data or a meaningless optimizer state. Everything else
# (rates, batch sizes, layout, precision, limits) may change between the parts of a run.
_FIXED = ("seed", "optimizer.name", "data.sequence_length", "data.reset_at_document_boundaries")

_FIXED_TUNING = ["tuning.method", "tuning.adapter", "tuning.distillation"]

# Fields of the model that change neither the shapes of its weights nor what they compute.
_FREE_MODEL_FIELDS = {"use_cache", "parallel_output", "pre_process_first", "post_process_last"}
_FREE_MODEL_FIELDS |= {"hidden_dropout", "attention_dropout", "enable_input_require_grads"}
_FREE_MODEL_FIELDS |= {"init_method_std", "output_layer_init_method"}


def check_same_run(config: RunConfig, saved: dict[str, Any]) -> None:
    """Refuse to go on with a config that describes another run.

    Args:
        config: what is asked for now.
        saved: the config in the checkpoint's ``state.json``.

    Raises:
        CheckpointError: naming every setting that must not change, with both values.
    """
    now = asdict(config)
    # A field that is younger than the checkpoint had what is now its default.
    saved = {**saved, "model": {**asdict(MegatronModelConfig()), **saved["model"]}}
    names = list(_FIXED)
    names += [f"model.{name}" for name in now["model"] if name not in _FREE_MODEL_FIELDS]
    names += ["tuning"] if now["tuning"] is None or saved.get("tuning") is None else _FIXED_TUNING
    problems = [
        f"{name} was {_get(saved, name)!r} and is {_get(now, name)!r}"
        for name in names
        if _get(saved, name) != _get(now, name)
    ]
    if problems:
        raise CheckpointError(
            f"the run in {config.run_dir} was begun with another config: {'; '.join(problems)}. "
            "Use the old values to go on, or another run_dir to begin anew."
        )


def _get(values: dict[str, Any], name: str) -> Any:
    section, _, field = name.rpartition(".")
    return ((values.get(section) or {}) if section else values).get(field)

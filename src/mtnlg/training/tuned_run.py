"""A run that trained an adapter, as a MODEL: its base, with the adapter of the newest checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mtnlg.config import CheckpointError, ConfigError
from mtnlg.config.adapter import AdapterConfig
from mtnlg.interop.adapter import Adapter, adapter_from_values
from mtnlg.training.adapter_files import merged_config, read_merged, stream_merged
from mtnlg.training.saved_run import SavedModel

if TYPE_CHECKING:
    from mtnlg.training.model_files import ModelFiles


def base_of_run(saved: SavedModel) -> str | None:
    """The base of a run that trained an adapter; ``None`` where the checkpoint holds the whole model."""
    tuning = saved.state["config"].get("tuning")
    return None if not tuning or tuning["method"] == "full" else str(tuning["base"])


def saved_adapter(saved: SavedModel, base_fingerprint: str | None = None) -> Adapter:
    """The adapter in a checkpoint.

    Raises:
        CheckpointError: it is damaged, or its config is not this version's.
    """
    try:
        config = AdapterConfig(**saved.state["config"]["tuning"]["adapter"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{saved.checkpoint}: its adapter's config is broken: {error}.") from None
    return adapter_from_values(config, dict(saved.stream_weights()), base_fingerprint)


def with_saved_adapter(base: ModelFiles, saved: SavedModel) -> ModelFiles:
    """The model of a run that trained an adapter beside ``base``."""
    adapter, where = saved_adapter(saved), str(saved.checkpoint)
    return replace(
        base,
        config=merged_config(base.config, adapter),
        read=partial(read_merged, base, adapter, where),
        stream=partial(stream_merged, base, adapter, where),
        adapter=adapter,
        base=base,
    )

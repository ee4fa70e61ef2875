"""When tensor-parallel ranks can send while they multiply."""

from __future__ import annotations

from mtnlg.config.layout import LayoutConfig
from mtnlg.config.training import TrainingConfig

NEEDS_GPUS = "it needs GPUs that read each other's memory, and this run is on the CPU"


def async_tensor_obstacle(layout: LayoutConfig, training: TrainingConfig, device_type: str | None) -> str:
    """Why ``layout.async_tensor_parallel`` cannot be on; empty where nothing in the config prevents it.

    Args:
        layout: the layout asked for.
        training: the engine's switches.
        device_type: ``cpu``, ``cuda`` or ``None`` where it is not known yet.
    """
    if layout.tensor_parallel_size == 1:
        return "layout.tensor_parallel_size is 1, so no matrix is shared"
    if not layout.sequence_parallel:
        return "it needs layout.sequence_parallel, whose gathers and scatters it splits up"
    if not training.compile:
        return "the compiler does it: it needs training.compile"
    if device_type == "cpu":
        return NEEDS_GPUS
    return ""


def async_tensor_problems(layout: LayoutConfig, training: TrainingConfig) -> list[str]:
    """What speaks against ``layout.async_tensor_parallel: true`` in the config itself."""
    obstacle = async_tensor_obstacle(layout, training, training.device)
    if layout.async_tensor_parallel and obstacle:
        return [refusal(obstacle)]
    return []


def refusal(obstacle: str) -> str:
    """The message for a setting that cannot be followed."""
    return (
        f"layout.async_tensor_parallel is true and cannot be: {obstacle}. Leave it out to have it "
        "wherever it is possible."
    )

"""A trained model out of a run's folder: which checkpoint, its architecture, its weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mtnlg.config import BlendEntry, CheckpointError, ConfigError, MegatronModelConfig, RunConfig
from mtnlg.config.load import load_run_config
from mtnlg.interop.lazy_tensor import Cut
from mtnlg.interop.tensor_folder import TensorFolder
from mtnlg.training import checkpoint_files as files

_HEAD, _EMBEDDING = "head.output.weight", "embedding.tokens.weight"


@dataclass(frozen=True)
class SavedModel:
    """What a checkpoint holds of the model.

    Args:
        checkpoint: its folder.
        run_dir: the run it belongs to; the folder itself where it was copied out of its run.
        config: the architecture.
        state: what else was saved (``step``, ``tokens``, ``config``, ...).
    """

    checkpoint: Path
    run_dir: Path
    config: MegatronModelConfig
    state: dict[str, Any]

    @property
    def tokenizer_dir(self) -> Path | None:
        """The run's tokenizer, if it is there."""
        folder = self.run_dir / "tokenizer"
        return folder if folder.is_dir() else None

    def read_weights(self) -> dict[str, Tensor]:
        """All parameters by name, whole, on the CPU.

        Raises:
            CheckpointError: weights are missing, damaged, or not the config's.
        """
        state = dict(self.stream_weights())
        if self.config.tie_word_embeddings and _EMBEDDING in state:
            state[_HEAD] = state[_EMBEDDING]
        return state

    def stream_weights(
        self, wanted: Collection[str] | None = None, cut: Cut | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, one in memory at a time; a tied head is not among them.

        Args:
            wanted: only these; ``None`` is all.
            cut: what is wanted of each: a view of it; nothing else is read. ``None`` is all.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        source = TensorFolder.of_folder(self.checkpoint / "weights")
        for name in sorted(source.names):
            if wanted is None or name in wanted:
                yield name, source.read(name, cut)


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is one checkpoint of a run."""
    return (folder / files.STATE).is_file() and (folder / "weights").is_dir()


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run's."""
    return (folder / "config.yaml").is_file() or files.checkpoints_dir(folder).is_dir()


def open_run(run_dir: Path) -> SavedModel:
    """The newest checkpoint of a run whose weights are whole; a warning names any passed over.

    Raises:
        CheckpointError: there is none.
    """
    latest = files.latest_checkpoint(run_dir)
    candidates = [path for path in (latest, *files.list_checkpoints(run_dir)) if path is not None]
    problems: list[str] = []
    for checkpoint in dict.fromkeys(candidates):
        try:
            saved = open_checkpoint(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"{problems[0]} Using {checkpoint.name}, the newest checkpoint that is whole.", stacklevel=3
            )
        return saved
    if problems:
        raise CheckpointError(f"{run_dir}: none of its checkpoints is whole: {problems[0]}")
    raise CheckpointError(
        f"{run_dir} has no checkpoint yet: train it first (mtnlg train), or wait for its first save."
    )


def open_checkpoint(checkpoint: Path) -> SavedModel:
    """One checkpoint, its weights' files compared with its manifest.

    Raises:
        CheckpointError: it is incomplete or damaged, or its config is not this version's.
    """
    files.verify_files(checkpoint, only=("weights/", files.STATE))
    state = files.read_state(checkpoint)
    try:
        config = MegatronModelConfig(**state["config"]["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint / files.STATE}: its model config is broken: {error}.") from None
    is_inside = checkpoint.absolute().parent.name == "checkpoints"
    run_dir = checkpoint.absolute().parent.parent if is_inside else checkpoint
    return SavedModel(checkpoint, run_dir, config, state)


def load_run(run_dir: Path) -> RunConfig:
    """The config of a run, its token files found even if the run's folder was moved.

    Raises:
        ConfigError: ``config.yaml`` is missing or broken.
    """
    config = load_run_config(run_dir / "config.yaml")
    blend = [_moved_along(entry, run_dir) for entry in config.data.blend]
    return replace(config, run_dir=str(run_dir), data=replace(config.data, blend=blend))


def _moved_along(entry: BlendEntry, run_dir: Path) -> BlendEntry:
    inside = run_dir / "data" / Path(entry.path).name
    if Path(f"{entry.path}.idx").is_file() or not Path(f"{inside}.idx").is_file():
        return entry
    return replace(entry, path=str(inside))

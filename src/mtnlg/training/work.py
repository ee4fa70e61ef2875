"""What a run works on: where its batches come from, and what its weights are before the first step.

The trainer knows how steps are made and kept. Everything else that tells one kind of run from another is
asked of one object: :class:`Work` itself is training from the beginning; tuning is another.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mtnlg.config import RunConfig
from mtnlg.config.progress import Progress
from mtnlg.parallel.adapters import start_laid_out_adapter
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.model import ParallelModel
from mtnlg.tokens.batch import Batch
from mtnlg.tokens.denoising import open_stream
from mtnlg.tokens.tokenizer import Tokenizer
from mtnlg.training.prepare import prepare


class Stream(Protocol):
    """Samples by position: the same whatever the ranks, batch sizes and restarts."""

    num_samples: int | None

    def batch(self, position: int, count: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """This replica's share of the samples ``position`` to ``position + count``."""

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def check(self, state: dict[str, Any]) -> int:
        """The position in ``state``; raises ``DataError`` where that was other data."""


class Work:
    """Training from the beginning, on token files. Must be picklable: ranks get a copy each.

    Attributes:
        evaluates_the_start: whether the first weights are worth an evaluation before the first step.
    """

    evaluates_the_start = False

    def prepare(self, config: RunConfig, progress: Progress) -> RunConfig:
        """Make everything in ``run_dir`` that training reads; the config with what was found out."""
        return prepare(config, progress)

    def training_stream(self, config: RunConfig) -> Stream:
        """Endless samples to learn from."""
        model = config.model
        return open_stream(
            config.data, "train", config.seed, vocab_size=model.vocab_size, has_encoder=model.has_encoder
        )

    def validation_stream(self, config: RunConfig, num_samples: int | None) -> Stream | None:
        """Samples to evaluate on, at most ``num_samples``; ``None`` where there are none."""
        if config.data.split_shares()[1] == 0.0:
            return None
        return open_stream(
            config.data, "validation", config.seed, num_samples, has_encoder=config.model.has_encoder
        )

    def lay_out(self, config: RunConfig, mesh: Mesh) -> ParallelModel:
        """This rank's part of the model; every rank calls this."""
        return lay_out(
            config.model, mesh, seed=config.seed, precision=config.precision, switches=config.training
        )

    def begin(self, config: RunConfig, model: ParallelModel, resumes: bool) -> None:
        """Put the first weights into ``model``, before a checkpoint's where the run goes on.

        Here they are those that :meth:`lay_out` drew; virtual tokens begin as tokens of the vocabulary.
        """
        adapter = config.adapter
        if adapter is not None and not resumes:
            text, ids = adapter.init_text, []
            if text:
                ids = Tokenizer.from_pretrained(str(config.tokenizer.path)).encode(text)
            start_laid_out_adapter(model, adapter, config.seed, ids)

    def saved_weights(self, config: RunConfig, model: ParallelModel) -> dict[str, Tensor]:
        """What a checkpoint keeps of ``model``, sharing its memory: it is loaded into it, too."""
        return model.state_dict()

    def evaluate(self, config: RunConfig, model: ParallelModel) -> dict[str, float]:
        """More metrics of an evaluation; every rank calls this."""
        return {}

    def finish(self, config: RunConfig, model: ParallelModel, mesh: Mesh) -> None:
        """The run's last checkpoint is written; every rank calls this."""

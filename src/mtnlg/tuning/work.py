"""Tuning as a kind of run: examples instead of token files, a base's weights instead of drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from mtnlg.config import RunConfig
from mtnlg.config.progress import Progress
from mtnlg.interop.peft import write_adapter
from mtnlg.model.adapters import is_of_adapter
from mtnlg.parallel.adapters import start_laid_out_adapter
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.model import ParallelModel
from mtnlg.tokens import Tokenizer
from mtnlg.training.adapter_files import base_fingerprint
from mtnlg.training.model_files import open_model_files
from mtnlg.training.saved_run import open_run
from mtnlg.training.tuned_run import saved_adapter
from mtnlg.training.work import Stream, Work
from mtnlg.tuning.distillation import learn_from_teacher
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.first_weights import load_codes, load_weights
from mtnlg.tuning.prepare import (
    examples_path,
    prepare_tuning,
    training_stream,
    tuning_of,
    validation_stream,
)

ADAPTER_FOLDER = "adapter"  # in a run's folder


def _say_nothing(_report: str) -> None:
    pass


class Tuning(Work):
    """Runs with a section ``tuning``.

    Args:
        tell: given the statistics and examples of the data before training starts.
    """

    evaluates_the_start = True  # what tuning gained is seen beside it

    def __init__(self, tell: Callable[[str], None] = _say_nothing) -> None:
        self.tell = tell

    def prepare(self, config: RunConfig, progress: Progress) -> RunConfig:
        """See :class:`~mtnlg.training.work.Work`."""
        return prepare_tuning(config, progress, self.tell)

    def training_stream(self, config: RunConfig) -> Stream:
        """See :class:`~mtnlg.training.work.Work`."""
        return training_stream(config, ExampleFile.read(examples_path(config, "train")))

    def validation_stream(self, config: RunConfig, num_samples: int | None) -> Stream | None:
        """See :class:`~mtnlg.training.work.Work`."""
        return validation_stream(config, num_samples)

    def lay_out(self, config: RunConfig, mesh: Mesh) -> ParallelModel:
        """See :class:`~mtnlg.training.work.Work`; the adapter is laid out with its model."""
        tuning = tuning_of(config)
        model = lay_out(
            config.model,
            mesh,
            seed=config.seed,
            precision=config.precision,
            switches=config.training,
            adapter=config.adapter,
        )
        if tuning.distillation is not None:
            learn_from_teacher(model, tuning.distillation)
        return model

    def begin(self, config: RunConfig, model: ParallelModel, resumes: bool) -> None:
        """Read the base; a run that goes on has its own copy of what full tuning changed."""
        tuning = tuning_of(config)
        if tuning.trains_adapter or not resumes:
            base = open_model_files(tuning.base)
            load_weights(model, base.stream, tuning.base, lambda name: not is_of_adapter(name))
            load_codes(model, base.stream, tuning.base)
        if tuning.trains_adapter and not resumes:
            text = tuning.adapter.init_text
            ids = Tokenizer.from_pretrained(str(config.tokenizer.path)).encode(text) if text else []
            start_laid_out_adapter(model, tuning.adapter, config.seed, ids)

    def saved_weights(self, config: RunConfig, model: ParallelModel) -> dict[str, Tensor]:
        """Everything, or only what is trained beside a base."""
        weights = model.state_dict()
        if not tuning_of(config).trains_adapter:
            return weights
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in weights.items() if name in trained}

    def finish(self, config: RunConfig, model: ParallelModel, mesh: Mesh) -> None:
        """Write the adapter as a folder of its own, which PEFT, the server and ``MODEL`` take."""
        tuning = tuning_of(config)
        if not tuning.trains_adapter or not mesh.is_main:
            return
        base = open_model_files(tuning.base)
        adapter = saved_adapter(open_run(Path(config.run_dir)), base_fingerprint(base))
        folder = Path(config.run_dir) / ADAPTER_FOLDER
        write_adapter(folder, adapter, config.model, tuning.base)
        Tokenizer.from_pretrained(str(config.tokenizer.path)).save_pretrained(folder)

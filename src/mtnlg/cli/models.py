"""Opening what a command line calls MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.api import MegatronLmModel
    from mtnlg.tokens import Tokenizer

MODEL_HELP = (
    "a run, a checkpoint, a Hugging Face folder or hub name, a GGUF file, Megatron's or DeepSpeed's"
)


def open_model(
    name_or_path: str, device: str | None = None, arguments: Namespace | None = None
) -> tuple[MegatronLmModel, Tokenizer]:
    """The model and its tokenizer, on the device asked for or the best that is present.

    Args:
        name_or_path: MODEL.
        device: ``cpu`` or ``cuda``.
        arguments: what else the command line says. It may ask for several ranks
            (:func:`~mtnlg.cli.ranks.add_rank_arguments`): the model then has its weights there, and only
            engines can run it. And it may name a draft model
            (:func:`~mtnlg.cli.engine_options.add_engine_arguments`).

    Raises:
        CheckpointError: nothing loadable is there.
        ConfigError: the device is not there, or the model has no tokenizer.
    """
    from mtnlg.api import MegatronLmModel
    from mtnlg.cli.ranks import open_over_ranks, wants_ranks
    from mtnlg.config import ConfigError
    from mtnlg.training.device import choose_device

    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}: choose cpu or cuda.")
    named = getattr(arguments, "adapter", None)
    adapter = named if isinstance(named, str) else None  # a server has many, by name
    if arguments is not None and wants_ranks(arguments):
        sizes = (arguments.tensor_parallel_size, arguments.pipeline_parallel_size)
        model = open_over_ranks(name_or_path, choose_device(device), *sizes, adapter)
    else:
        model = MegatronLmModel.from_pretrained(name_or_path, device=choose_device(device))
        if adapter is not None:
            _put_in(model, adapter)
    if model.tokenizer is None:
        raise ConfigError(f"{name_or_path} holds no tokenizer, so it can neither read nor write text.")
    draft = getattr(arguments, "draft_model", None)
    if draft is not None:
        model.draft_model = MegatronLmModel.from_pretrained(draft, device=choose_device(device))
    return model, model.tokenizer


def add_adapter_argument(parser: ArgumentParser) -> None:
    """Declare the adapter that one program speaks with."""
    what = "an adapter's folder, as mtnlg tune and PEFT write it, for this model"
    parser.add_argument("--adapter", type=str | None, default=None, metavar="DIR", help=what)


def _put_in(model: MegatronLmModel, folder: str) -> None:
    """Change the model by an adapter; where that can be, its weights, which costs nothing afterwards."""
    from mtnlg.quantization import quantized_linears

    model.add_adapter(folder)
    is_low_rank = model.adapter is not None and not model.adapter.num_positions
    if is_low_rank and not quantized_linears(model):
        model.merge_adapter()


def run_folder(name_or_path: str) -> Path:
    """The run that MODEL is, or that the checkpoint MODEL belongs to.

    Raises:
        ConfigError: it is no run, so it has no splits.
    """
    from mtnlg.config import ConfigError

    path = Path(name_or_path)
    for folder in (path, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{path} is not a run's folder, so it has no splits: give --files with text to use.")

"""What people call MODEL, as files: a run, a checkpoint, a Hugging Face folder or hub name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop import (
    fetch_from_hub,
    looks_like_hub_name,
    open_foreign,
    open_gguf,
    read_config,
    read_weights,
    stream_weights,
)
from mtnlg.interop.adapter import Adapter
from mtnlg.interop.peft import base_name, is_adapter
from mtnlg.interop.quantized import (
    quantization_of,
    read_quantized,
    read_quantized_config,
    stream_quantized,
)
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.sentencepiece_file import FILE_NAME as SENTENCEPIECE_NAME
from mtnlg.tokens.t5_tokenizer import T5Tokenizer
from mtnlg.training.adapter_files import with_adapter
from mtnlg.training.saved_run import is_checkpoint, is_run, open_checkpoint, open_run
from mtnlg.training.tuned_run import base_of_run, with_saved_adapter


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be read.

    Args:
        config: the architecture.
        tokenizer: the model's, if one lies beside it.
        read: all parameters by name, whole, on the CPU, a tied head among them.
        stream: those of the names given, one in memory at a time; a tied head is the embedding. A second
            argument, ``cut(name, whole)``, gives the view of each that is wanted: only that is read.
        adapter: of an adapter's folder, whose updates ``read`` and ``stream`` have merged already.
        base: what it was made for.
        holds_codes: the files are quantized already; what ``stream`` is asked for by name it gives in
            floating point.
    """

    config: MegatronModelConfig
    tokenizer: Tokenizer | None
    read: Callable[[], dict[str, Tensor]]
    stream: Callable[..., Iterator[tuple[str, Tensor]]]
    adapter: Adapter | None = None
    base: ModelFiles | None = None
    holds_codes: bool = False

    @property
    def float_config(self) -> MegatronModelConfig:
        """The architecture of a copy whose parameters are streamed by name."""
        config = self.config
        return replace(config, quantize=False, quantize_config=None) if self.holds_codes else config


def open_model_files(name_or_path: str | os.PathLike[str]) -> ModelFiles:
    """Find out what is there; no weights are read yet.

    Raises:
        CheckpointError: nothing loadable is there; the message says what was looked for.
    """
    folder = Path(name_or_path)
    if folder.is_file() and folder.suffix == ".gguf":
        found, tokenizer = open_gguf(folder)
        return ModelFiles(found.config, tokenizer, found.read, found.stream)
    if not folder.is_dir():
        folder = _from_elsewhere(name_or_path)
    if is_checkpoint(folder) or is_run(folder):
        saved = open_checkpoint(folder) if is_checkpoint(folder) else open_run(folder)
        tokenizer = _read_tokenizer(saved.tokenizer_dir, saved.config)
        if (base := base_of_run(saved)) is not None:
            return replace(with_saved_adapter(open_model_files(base), saved), tokenizer=tokenizer)
        return ModelFiles(saved.config, tokenizer, saved.read_weights, saved.stream_weights)
    if is_adapter(folder):
        return with_adapter(_open_base(folder), folder)
    if not any(folder.glob("*.safetensors")) and (foreign := open_foreign(folder)) is not None:
        return ModelFiles(foreign.config, _read_tokenizer(folder), foreign.read, foreign.stream)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: neither a run (config.yaml, checkpoints/) nor a checkpoint (state.json, weights/) "
            "nor a Hugging Face folder (config.json) nor an adapter's (adapter_config.json) "
            "nor a checkpoint of Megatron-LM or DeepSpeed."
        )
    if quantization_of(folder) is not None:
        config = read_quantized_config(folder)
        read, stream = partial(read_quantized, folder, config), partial(stream_quantized, folder, config)
        return ModelFiles(config, _read_tokenizer(folder), read, stream, holds_codes=True)
    config = read_config(folder)
    read, stream = partial(read_weights, folder, config), partial(stream_weights, folder, config)
    return ModelFiles(config, _read_tokenizer(folder, config), read, stream)


def _open_base(folder: Path) -> ModelFiles:
    """The base that an adapter's folder names; a path may be one from that folder."""
    name = base_name(folder)
    beside = folder / name
    try:
        return open_model_files(beside if beside.is_dir() else name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: its base model cannot be opened ({error}) Write where it lies now into "
            "base_model_name_or_path of adapter_config.json."
        ) from error


def _from_elsewhere(name_or_path: str | os.PathLike[str]) -> Path:
    """A hub model's folder; a path in a folder that exists is a misspelt path and no hub name."""
    path = Path(name_or_path)
    is_path = len(path.parts) > 1 and path.parent.is_dir()
    if isinstance(name_or_path, str) and looks_like_hub_name(name_or_path) and not is_path:
        return fetch_from_hub(name_or_path)
    neighbours = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, neighbours, n=1, cutoff=0.5)
    hint = f": did you mean {path.parent / near[0]}?" if near else "."
    raise CheckpointError(f"{path}: there is no such folder{hint}")


def _read_tokenizer(folder: Path | None, config: MegatronModelConfig | None = None) -> Tokenizer | None:
    if folder is not None and config is not None and config.architecture == "encoder_decoder":
        is_there = any((folder / one).is_file() for one in ("tokenizer.json", SENTENCEPIECE_NAME))
        return T5Tokenizer.from_pretrained(folder) if is_there else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_pretrained(folder)

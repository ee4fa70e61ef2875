"""Any MODEL as a folder of its own: Hugging Face's form where it has one for it, else ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError
from mtnlg.config.progress import Progress, no_progress
from mtnlg.interop import nearest_architecture, write_hugging_face_folder, write_tensors
from mtnlg.interop.names import parameter_shapes
from mtnlg.tokens import Tokenizer
from mtnlg.training import checkpoint_files
from mtnlg.training.model_files import ModelFiles


def import_model(
    files: ModelFiles,
    out: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> str:
    """Write the model, one tensor in memory beside one file's.

    Args:
        files: the model.
        out: the folder, created if need be.
        tokenizer: goes along.
        dtype: of the weights; ``None`` keeps theirs.
        progress: told of parameters.

    Returns:
        What the folder is, in words.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
        CheckpointError: weights are missing, or the disk refused.
    """
    if tokenizer is not None and tokenizer.vocab_size > files.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {files.config.vocab_size}: "
            "they do not belong together."
        )
    try:
        family = nearest_architecture(files.float_config).model_type
    except ConfigError:
        _write_checkpoint(files, out, tokenizer, dtype, progress)
        return "a checkpoint of mtnlg (no Hugging Face family computes this model)"
    end = None if tokenizer is None else tokenizer.end_of_text_id
    write_hugging_face_folder(
        out, files.float_config, files.stream, end_of_text_id=end, dtype=dtype, progress=progress
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return f"a Hugging Face folder ({family})"


def _write_checkpoint(
    files: ModelFiles,
    out: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    written = 0
    names = set(parameter_shapes(files.config)) if files.holds_codes else None

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal written
        for name, tensor in files.stream(names):
            written += tensor.numel()
            progress("writing", written, files.config.num_parameters, "parameters")
            yield name, tensor.to(dtype)

    try:
        (out / "weights").mkdir(parents=True, exist_ok=True)
        write_tensors(out / "weights", tensors())
        if tokenizer is not None:
            tokenizer.save_pretrained(out / "tokenizer")
        state = {"step": 0, "tokens": 0, "config": {"model": files.float_config.to_dict()}}
        (out / checkpoint_files.STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        kept = [name for name in checkpoint_files.data_files(out) if not name.startswith("tokenizer/")]
        checkpoint_files.write_manifest(
            out, {name: checkpoint_files.file_entry(out / name) for name in kept}
        )
    except OSError as error:
        raise CheckpointError(f"{out}: the model could not be saved ({error}).") from error

"""Checkpoints of other trainers, whatever they are: Megatron-LM, Megatron-DeepSpeed, DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from mtnlg.config import CheckpointError
from mtnlg.interop.deepspeed import is_deepspeed, open_deepspeed
from mtnlg.interop.hugging_face import CONFIG_NAME, model_type_of, read_config
from mtnlg.interop.megatron import is_megatron, open_megatron
from mtnlg.interop.named_tensors import NamedTensors
from mtnlg.interop.tensor_folder import TensorFolder
from mtnlg.interop.weights import tensor_views


def open_foreign(folder: Path) -> NamedTensors | None:
    """The model in another trainer's checkpoint, ``None`` where there is none; no weights are read yet.

    Raises:
        CheckpointError: files are missing or damaged, or hold a model that we do not compute.
    """
    if is_megatron(folder):
        return open_megatron(folder)
    if not is_deepspeed(folder):
        return None
    found = open_deepspeed(folder)
    if found.megatron is not None:
        return found.megatron
    beside = next((place for place in (folder, folder.parent) if (place / CONFIG_NAME).is_file()), None)
    if beside is None:
        raise CheckpointError(
            f"{folder}: DeepSpeed's weights say nothing of the model: put its config.json (and tokenizer) "
            "from Hugging Face into this folder."
        )
    config = read_config(beside)
    source = TensorFolder.of_tensors(found.tensors)
    views = tensor_views(model_type_of(beside), config, source, str(folder))
    return NamedTensors(config, dict(views))

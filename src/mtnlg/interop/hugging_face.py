"""Hugging Face model folders: ``config.json`` and safetensors, read and written."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.architectures import from_hugging_face, nearest_architecture, to_hugging_face
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES, TensorFolder, write_tensors
from mtnlg.interop.weights import EMBEDDING, HEAD, export_tensors, import_tensors
from mtnlg.model import MegatronLmDecoder

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"


def read_config(folder: Path) -> MegatronModelConfig:
    """The architecture in ``folder/config.json``.

    Raises:
        CheckpointError: the file is missing, broken, or of an architecture that is not ours.
    """
    return from_hugging_face(_read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))


def read_weights(folder: Path, config: MegatronModelConfig) -> dict[str, Tensor]:
    """All parameters of ``config`` by our names, from the safetensors in ``folder``.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the config.
    """
    state = dict(stream_weights(folder, config))
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state


def stream_weights(
    folder: Path, config: MegatronModelConfig, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters by our names, one after the other; a tied head is not among them.

    Args:
        folder: of safetensors.
        config: the architecture.
        wanted: only these; ``None`` is all.

    Raises:
        CheckpointError: as :func:`read_weights`.
    """
    model_type = _read_json(folder / CONFIG_NAME)["model_type"]
    source = TensorFolder.of_hugging_face(folder)
    for name, tensor in import_tensors(model_type, config, source, str(folder), wanted):
        if wanted is None or name in wanted:
            yield name, tensor


def write_hugging_face(
    model: MegatronLmDecoder,
    folder: Path,
    *,
    end_of_text_id: int | None = None,
    padding_id: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model`` as the nearest Hugging Face architecture.

    Args:
        model: a whole decoder (not a pipeline stage) with its weights.
        folder: created if need be; weights of an earlier save there are replaced.
        end_of_text_id: recorded as the family's end (and begin) token.
        padding_id: recorded likewise.
        dtype: of the saved weights; ``None`` keeps theirs.
        max_shard_bytes: largest weight file.

    Raises:
        ConfigError: no architecture computes this config; the message names the fields.
        CheckpointError: the disk refused.
    """
    saved = to_hugging_face(model.config)
    model_type = nearest_architecture(model.config).model_type
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise CheckpointError(f"{folder}: the model is on the meta device and has no weights to save.")

    def read(name: str) -> Tensor:
        is_bias = name.endswith("selection_bias")  # transformers keeps it in float32, too
        return parameters[name].detach().to(dtype=None if is_bias else dtype)

    saved["dtype"] = str(dtype or parameters[EMBEDDING].dtype).removeprefix("torch.")
    tokens = dict(bos_token_id=end_of_text_id, eos_token_id=end_of_text_id, pad_token_id=padding_id)
    saved |= tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, export_tensors(model_type, model.config, read), max_shard_bytes)
        _write_json(folder / CONFIG_NAME, saved)
        given = {name: token for name, token in tokens.items() if token is not None}
        _write_json(folder / GENERATION_NAME, given)
    except OSError as error:
        raise CheckpointError(f"{folder}: the model could not be saved ({error}).") from error


def _read_json(path: Path) -> dict:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: broken JSON ({error}).") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not a {type(parsed).__name__}.")
    return parsed


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)

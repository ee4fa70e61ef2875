"""A model by its name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from mtnlg.config import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model"]
# Where there are no safetensors: pickles, of which nothing is run (mtnlg.interop.torch_file).
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin"]


def looks_like_hub_name(name: str) -> bool:
    """Whether ``name`` can be a hub name (``gpt2``, ``owner/model``) rather than a path."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.startswith((".", "/"))


def fetch_from_hub(name: str) -> Path:
    """The local folder of a hub model, downloaded if need be: JSON, and safetensors or else ``.bin``.

    Raises:
        CheckpointError: it cannot be had: not installed, no network, no such model, no weights.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder here, and looking on the Hugging Face hub needs "
            "huggingface_hub (pip install huggingface_hub)."
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_WANTED, *_PICKLES]))
    except Exception as error:  # the library raises many kinds, from many layers
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such folder here, and the Hugging Face hub gave nothing ({reason}). "
            f"{_by_hand(name)}"
        ) from error
    if not any(found.suffix in (".safetensors", ".bin") for found in folder.glob("*")):
        raise CheckpointError(
            f"{name}: the Hugging Face hub has no model.safetensors and no pytorch_model.bin of it, or "
            f"only the rest is in the cache here ({folder}). {_by_hand(name)}"
        )
    return folder


def _by_hand(name: str) -> str:
    return (
        f"Without a network: fetch the files elsewhere (hf download {name} --local-dir FOLDER, or by hand: "
        "config.json, tokenizer.json and every *.safetensors, or pytorch_model*.bin where there are none), "
        "bring the folder here and give its path."
    )

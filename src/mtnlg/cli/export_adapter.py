"""``mtnlg export ADAPTER --format peft``: the adapter alone, as PEFT, vLLM and our server load it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import Namespace

    from mtnlg.config.progress import Progress
    from mtnlg.training.model_files import ModelFiles


def to_peft(files: ModelFiles, out: Path, arguments: Namespace, progress: Progress) -> str:
    """Write the adapter of a tuned run, or of another adapter's folder.

    Raises:
        ConfigError: the model has no adapter beside it.
    """
    from dataclasses import replace

    from mtnlg.config import ConfigError
    from mtnlg.interop.peft import write_adapter
    from mtnlg.training.adapter_files import base_fingerprint

    if files.adapter is None or files.base is None:
        raise ConfigError(
            f"--format peft: {arguments.model} is a whole model and no adapter: give a run of mtnlg tune "
            "--method lora, prompt or prefix, or an adapter's folder."
        )
    base, adapter = _base_of(arguments.model), files.adapter
    if adapter.base_fingerprint is None:
        adapter = replace(adapter, base_fingerprint=base_fingerprint(files.base))
    write_adapter(out, adapter, files.base.config, base)
    if files.tokenizer is not None:
        files.tokenizer.save_pretrained(out)
    return f"peft.PeftModel.from_pretrained(base, {str(out)!r}), or mtnlg serve {base} --adapter NAME={out}"


def _base_of(name_or_path: str) -> str:
    """The base as the run or the folder names it."""
    from pathlib import Path

    from mtnlg.interop.peft import base_name, is_adapter
    from mtnlg.training.saved_run import is_checkpoint, open_checkpoint, open_run
    from mtnlg.training.tuned_run import base_of_run

    folder = Path(name_or_path)
    if is_adapter(folder):
        return base_name(folder)
    saved = open_checkpoint(folder) if is_checkpoint(folder) else open_run(folder)
    return base_of_run(saved) or ""

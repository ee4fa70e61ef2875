"""What can begin before torch is imported: compiling the kernels that a model will need."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import mtnlg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonargparse import Namespace

KERNELS = Path(mtnlg.__file__).parent / "generation" / "kernels"
# What the processor must have for each; the kernels say the same where they are used.
DECODER = {"decoder.cpp": ()}
CHOICE = {"mask.cpp": (), "choose.cpp": ()}
TILES = {"tiled_product.cpp": ("avx512f",)}
INTEGERS = {"integer_product.cpp": ("avx512_vnni",)}
CODES = {"float_product.cpp": ("avx512f", "avx512bw", "avx512vl")}
WORTH_BEGINNING = 10_000_000  # bytes of weights; for smaller models nothing is compiled
GPU = Path("/dev/nvidiactl")


def begin_kernels(arguments: Namespace) -> None:
    """Begin to compile, on a machine that never did; a few milliseconds where everything is there.

    Args:
        arguments: of a verb that generates: ``model``, ``device`` and the engine's.
    """
    is_on_cpu = arguments.device == "cpu" or (arguments.device is None and not GPU.exists())
    if not is_on_cpu or arguments.compile == "off" or not _is_large(Path(arguments.model)):
        return
    from mtnlg.native import begin

    # What takes longest first, and at last what is wanted after the weights are laid out.
    wanted = DECODER | dict(_codes(Path(arguments.model))) | TILES | CHOICE
    begin({KERNELS / file: needed for file, needed in wanted.items()})


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While a model is loaded beside the compilers: torch's threads, which wait awake for their next bit of
    work, leave them the cores."""
    from mtnlg.native import is_busy

    if not is_busy():
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_large(model: Path) -> bool:
    """Whether files are there that hold millions of weights."""
    num_bytes = 0
    for path in [model, *(model.rglob("*") if model.is_dir() else ())]:
        num_bytes += path.stat().st_size if path.is_file() else 0
        if num_bytes >= WORTH_BEGINNING:
            return True
    return False


def _codes(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kernels of quantized layers, where a folder says that it holds such."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = saved.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # no such folder, or one that is complained about later
    if isinstance(said, dict):
        yield from (INTEGERS if said.get("activations") == "int8" else CODES).items()

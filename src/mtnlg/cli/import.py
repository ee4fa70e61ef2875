"""``mtnlg import SOURCE --out DIR``: other people's files as a folder that every verb takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXAMPLE = """
mtnlg import runs/demo --out models/demo
mtnlg import runs/demo --precision bf16 --out models/demo-bf16
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what is read and where it goes."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a checkpoint of Megatron-LM, Megatron-DeepSpeed or DeepSpeed, a GGUF file, a Hugging Face "
        "folder or hub name, or any MODEL",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        metavar="DIR",
        default=None,
        help="where SOURCE has none: its folder",
    )
    parser.add_argument(
        "--precision", type=str | None, default=None, help="float32, bf16 or fp16; null keeps it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(arguments: Namespace) -> int:
    """Write the folder and say what is in it."""
    from pathlib import Path

    from mtnlg.cli.export import dtype_of, is_taken
    from mtnlg.cli.terminal import ProgressDisplay, note, quantity
    from mtnlg.config import ConfigError
    from mtnlg.tokens import Tokenizer
    from mtnlg.training.import_model import import_model
    from mtnlg.training.model_files import open_model_files

    out = Path(arguments.out)
    if is_taken(out) and not arguments.overwrite:
        raise ConfigError(f"{out} is there already: choose another --out, or --overwrite.")
    files = open_model_files(arguments.source)
    chosen = Tokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else files.tokenizer
    with ProgressDisplay() as progress:
        kind = import_model(files, out, chosen, dtype_of(arguments), progress)
    if chosen is None:
        note("it has no tokenizer: put one into the folder, or give --tokenizer")
    print(f"{out}: {kind}, {quantity(files.config.num_parameters, 'parameters')}")
    print(f'next: mtnlg generate {out} "..."')
    return 0

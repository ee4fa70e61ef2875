"""``mtnlg tokenizer SOURCE... --vocab-size N --out DIR``: train a tokenizer from text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXAMPLE = """
mtnlg tokenizer texts/ --vocab-size 32768 --out tokenizer
mtnlg tokenizer poems.jsonl --text-key paragraphs --vocab-size 8192 --out tokenizer
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the sources, the size and how text is read."""
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens in all")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--min-frequency", type=int, default=2, help="a pair must occur so often")
    parser.add_argument(
        "--han-characters", type=int, default=2, help="most Han characters of a token; 1 suits verse"
    )
    parser.add_argument(
        "--sample-mb", type=float, default=100.0, help="train on an even sample of so many MB at most"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer that is there")
    add_reading_arguments(parser)


def add_reading_arguments(parser: ArgumentParser) -> None:
    """Declare what every verb that reads raw text takes."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files, folders or patterns of .txt, .jsonl, .json (also .gz, .zst) and .parquet",
    )
    parser.add_argument("--text-key", default="text", help="field of JSON and Parquet that holds the text")
    parser.add_argument(
        "--encoding-errors",
        default="strict",
        choices=["strict", "replace", "ignore"],
        help="bytes that are not UTF-8: stop, put a replacement sign, or drop them",
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help=r"cut plain text files into documents at this text (\n is a line break)",
    )


def separator_of(arguments: Namespace) -> str | None:
    r"""The document separator with ``\n`` and ``\t`` read as line break and tab."""
    text = arguments.document_separator
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def run(arguments: Namespace) -> int:
    """Train, save, and say how well the tokenizer packs the text."""
    import sys
    from pathlib import Path

    from mtnlg.cli.terminal import ProgressDisplay, note, quantity
    from mtnlg.config.errors import ConfigError
    from mtnlg.tokens.documents import ReadOptions
    from mtnlg.tokens.training import train_on_files

    if (Path(arguments.out) / "tokenizer.json").exists() and not arguments.overwrite:
        raise ConfigError(
            f"{arguments.out} holds a tokenizer already: choose another --out, or --overwrite."
        )
    reading = ReadOptions(arguments.text_key, arguments.encoding_errors, separator_of(arguments))
    on_terminal = sys.stderr.isatty()
    with ProgressDisplay() as progress:
        tokenizer, report = train_on_files(
            arguments.sources,
            arguments.vocab_size,
            reading,
            arguments.min_frequency,
            int(arguments.sample_mb * 1e6),
            progress=_quiet if on_terminal else progress,
            show_progress=on_terminal,  # the library's own bars also cover the merging
            han_characters=arguments.han_characters,
        )
    tokenizer.save_pretrained(arguments.out)
    if tokenizer.vocab_size < arguments.vocab_size:
        note(f"the text gave only {tokenizer.vocab_size} tokens of the {arguments.vocab_size} asked for")
    kind = "text kept out of the training" if report.held_out else "the training text"
    print(f"{arguments.out}: {tokenizer.vocab_size} tokens, from {quantity(report.num_bytes, 'bytes')}")
    print(
        f"{report.characters_per_token:.3f} characters ({report.bytes_per_token:.2f} bytes) a token "
        f"on {kind}"
    )
    print(f"next: mtnlg encode {arguments.sources[0]} --tokenizer {arguments.out} --out data/text")
    return 0


def _quiet(stage: str, done: float, total: float | None, unit: str = "") -> None:
    return None

"""``mtnlg encode SOURCE... --tokenizer DIR --out PREFIX``: turn text into token files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.cli.tokenizer import add_reading_arguments, separator_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXAMPLE = """
mtnlg encode texts/ --tokenizer tokenizer --out data/texts
mtnlg encode 'web/*.jsonl.zst' --tokenizer tokenizer --out data/web --workers 16
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the sources, the tokenizer, the output and the number of processes."""
    parser.add_argument("--tokenizer", metavar="DIR", required=True, help="Hugging Face tokenizer folder")
    parser.add_argument("--out", metavar="PREFIX", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--workers", type=int, help="processes; one per core if not given")
    parser.add_argument(
        "--no-end-of-text", action="store_true", help="do not end each document with the end-of-text token"
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "splintr", "tiktoken", "tokenizers"],
        help="what encodes; auto is the fastest one that agrees with tokenizers",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the token file that is there")
    add_reading_arguments(parser)


def run(arguments: Namespace) -> int:
    """Encode, and say how much and how fast."""
    from mtnlg.cli.terminal import ProgressDisplay, duration, note, quantity
    from mtnlg.tokens.encode import encode_files
    from mtnlg.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(arguments.tokenizer)
    with ProgressDisplay() as progress:
        report = encode_files(
            arguments.sources,
            tokenizer,
            arguments.out,
            arguments.text_key,
            arguments.workers,
            progress,
            encoding_errors=arguments.encoding_errors,
            document_separator=separator_of(arguments),
            append_end_of_text=not arguments.no_end_of_text,
            engine=arguments.engine,
            overwrite=arguments.overwrite,
        )
    if report.num_resumed == report.num_tasks:
        note(f"{report.prefix} was finished already; nothing was done again")
    elif report.num_resumed:
        note(
            f"went on from an interrupted run: {report.num_resumed} of {report.num_tasks} parts were there"
        )
    seconds = max(report.seconds, 1e-9)
    print(
        f"{report.prefix}.bin: {report.num_documents:,} documents, {report.num_tokens:,} tokens, "
        f"{report.characters_per_token:.3f} characters a token"
    )
    if not report.num_resumed:
        print(
            f"{quantity(report.num_bytes, 'bytes')} in {duration(seconds)}: "
            f"{quantity(report.num_bytes / seconds, 'bytes')}/s, "
            f"{quantity(report.num_tokens / seconds, 'tokens')}/s with {report.engine}"
        )
    return 0

"""What is about to be learnt, for a person to look at: lengths, shares, and a few examples."""

from __future__ import annotations

import numpy as np

from mtnlg.config import RunConfig
from mtnlg.tokens import Tokenizer
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.packing import fixed_rows
from mtnlg.tuning.pairs import PairRenderer, lengths_of, places_of
from mtnlg.tuning.rendering import Renderer

NUM_SHOWN = 3
SHOWN_TOKENS = 160
OPEN, CLOSE = "⟦", "⟧"


def describe(
    config: RunConfig,
    tokenizer: Tokenizer,
    renderer: Renderer | PairRenderer,
    train: ExampleFile,
    validation: ExampleFile | None,
) -> str:
    """The statistics of the examples and the first of them, decoded, with what is scored marked.

    Args:
        config: of the run.
        tokenizer: decodes.
        renderer: knows what was cut and left out.
        train: what is learnt.
        validation: what is evaluated on.
    """
    lines = [_split_line("training", train)]
    if validation is not None:
        lines.append(_split_line("validation", validation))
    lines += _of_pairs(config, train) if config.model.has_encoder else _of_texts(config, train)
    if renderer.num_cut or renderer.num_left_out:
        lines.append(
            f"longer than {config.data.sequence_length} tokens: {renderer.num_cut} conversations cut, "
            f"{renderer.num_left_out} left out (tuning.too_long, data.sequence_length)"
        )
    lines.append(f"examples, what is learnt between {OPEN} and {CLOSE}:")
    for number in range(min(NUM_SHOWN, len(train))):
        lines += [f"-- example {number + 1}", marked_text(tokenizer, *train.example(number))]
    return "\n".join(lines)


def _of_texts(config: RunConfig, train: ExampleFile) -> list[str]:
    length = config.data.sequence_length
    lines = [
        _quantiles("tokens of an example", train.lengths),
        _quantiles("scored tokens of one", train.scored_counts),
    ]
    how, rows = _rows(config, (train.lengths - 1).tolist())
    filled = float((train.lengths - 1).sum()) / (rows * length)
    return [*lines, f"{how} {rows} samples of {length} tokens, {100 * filled:.1f} % of them filled"]


def _of_pairs(config: RunConfig, train: ExampleFile) -> list[str]:
    """Of an encoder-decoder: what is read and what is written."""
    read, written = config.data.sequence_length, config.data.target_length(has_encoder=True)
    sources, targets = lengths_of(train)
    how, rows = _rows(config, places_of(train, read, written).tolist())
    of_sources = 100 * float(sources.sum()) / (rows * read)
    of_targets = 100 * float(targets.sum()) / (rows * written)
    return [
        _quantiles("tokens the encoder reads of an example", sources),
        _quantiles("tokens the decoder writes of one", targets),
        f"{how} {rows} samples of {read} tokens to read and {written} to write, {of_sources:.1f} % and "
        f"{of_targets:.1f} % of them filled",
    ]


def _rows(config: RunConfig, places: list[int]) -> tuple[str, int]:
    """How examples become samples, and how many."""
    packs = bool(config.tuning and config.tuning.packing)
    count = len(fixed_rows(places, config.data.sequence_length, packs))
    return "packed into" if packs else "one each in", count


def marked_text(tokenizer: Tokenizer, ids: np.ndarray, scored: np.ndarray) -> str:
    """An example as text, special tokens shown, its scored parts between marks."""
    shown, marks = ids[:SHOWN_TOKENS].tolist(), scored[:SHOWN_TOKENS].tolist()
    if marks:
        marks[0] = False  # nothing stands before it to predict it from
    parts, start = [], 0
    for place in range(1, len(shown) + 1):
        if place == len(shown) or marks[place] != marks[start]:
            text = tokenizer.decode(shown[start:place], skip_special_tokens=False)
            text = text.rstrip("\ufffd") if place == len(shown) < len(ids) else text  # half a character
            parts.append(f"{OPEN}{text}{CLOSE}" if marks[start] else text)
            start = place
    more = len(ids) - len(shown)
    return "".join(parts) + (f" ... ({more} more tokens)" if more > 0 else "")


def _split_line(name: str, examples: ExampleFile) -> str:
    tokens, scored = len(examples.tokens), int(examples.scored_counts.sum())
    return (
        f"{name}: {len(examples)} examples, {tokens} tokens, {scored} of them scored "
        f"({100 * scored / max(1, tokens):.1f} %)"
    )


def _quantiles(name: str, counts: np.ndarray) -> str:
    points = [int(np.quantile(counts, share)) for share in (0.0, 0.5, 0.9, 1.0)]
    least, middle, most_of_them, most = points
    return f"{name}: {least} at least, {middle} in the middle, 90 % up to {most_of_them}, {most} at most"

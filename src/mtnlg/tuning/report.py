"""What is about to be learnt, for a person to look at: lengths, shares, and a few examples."""

from __future__ import annotations

import numpy as np

from mtnlg.config import RunConfig
from mtnlg.tokens import Tokenizer
from mtnlg.tuning.example_file import ExampleFile
from mtnlg.tuning.packing import fixed_rows
from mtnlg.tuning.rendering import Renderer

NUM_SHOWN = 3
SHOWN_TOKENS = 160
OPEN, CLOSE = "⟦", "⟧"


def describe(
    config: RunConfig,
    tokenizer: Tokenizer,
    renderer: Renderer,
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
    lines.append(_quantiles("tokens of an example", train.lengths))
    lines.append(_quantiles("scored tokens of one", train.scored_counts))
    length, packs = config.data.sequence_length, bool(config.tuning and config.tuning.packing)
    rows = fixed_rows((train.lengths - 1).tolist(), length, packs)
    filled = float((train.lengths - 1).sum()) / (len(rows) * length)
    how = "packed into" if packs else "one each in"
    lines.append(f"{how} {len(rows)} samples of {length} tokens, {100 * filled:.1f} % of them filled")
    if renderer.num_cut or renderer.num_left_out:
        lines.append(
            f"longer than {length} tokens: {renderer.num_cut} conversations cut, "
            f"{renderer.num_left_out} left out (tuning.too_long, data.sequence_length)"
        )
    lines.append(f"examples, what is learnt between {OPEN} and {CLOSE}:")
    for number in range(min(NUM_SHOWN, len(train))):
        lines += [f"-- example {number + 1}", marked_text(tokenizer, *train.example(number))]
    return "\n".join(lines)


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

"""From what a user asked for to a compiled rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.generation.constraint import Constraint
from mtnlg.generation.constraints.verse import verse_constraint
from mtnlg.tokens.tokenizer import END_OF_TURN, Tokenizer

KINDS = ("json_schema", "json_object", "regex", "grammar", "choice", "verse")


def constraint_from_options(
    tokenizer: Tokenizer,
    vocab_size: int,
    kind: str,
    value: Any = None,
    end_ids: Collection[int] | None = None,
) -> Constraint:
    """Compile a rule; the same one asked for again is not compiled twice.

    Args:
        tokenizer: of the model.
        vocab_size: tokens the model gives logits for; those the tokenizer does not have are never
            allowed.
        kind: one of ``KINDS``.
        value: for ``json_schema`` a schema (dict or JSON text); for ``json_object`` nothing; for
            ``regex`` the expression that the whole continuation matches; for ``grammar`` Lark (with a
            ``start`` rule) or llama.cpp's GBNF (with a ``root`` rule); for ``choice`` the strings one of
            which it is; for ``verse`` a form (see
            ``VerseForm.from_value``).
        end_ids: tokens that end a sequence; none are :func:`default_end_ids`. They are allowed where
            the rule is complete, and nowhere else.

    Raises:
        ConfigError: the rule cannot be used; the message says what is wrong with it. Or the package
            that compiles it is missing.
    """
    from mtnlg.generation.constraints import guided

    if kind not in KINDS:
        raise ConfigError(f"constraint is {kind!r}: choose one of {', '.join(KINDS)}.")
    ends = tuple(sorted(end_ids or default_end_ids(tokenizer)))
    if kind == "verse":
        return verse_constraint(tokenizer, vocab_size, value, ends)
    grammars: dict[str, Callable[[Any], str]] = {
        "json_schema": guided.json_schema_grammar,
        "json_object": guided.json_object_grammar,
        "regex": guided.regex_grammar,
        "grammar": guided.context_free_grammar,
        "choice": guided.choice_grammar,
    }
    grammar, expression = grammars[kind](value), value if kind == "regex" else None
    return guided.compile_grammar(tokenizer, vocab_size, ends, grammar, kind, expression)


def default_end_ids(tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens that end a text or a turn of a dialogue, as far as the tokenizer has them."""
    found = {tokenizer.special_tokens.get(END_OF_TURN)}
    try:
        found.add(tokenizer.end_of_text_id)
    except DataError:  # a foreign tokenizer need not name one
        found.discard(None)
    return sorted(token for token in found if token is not None)

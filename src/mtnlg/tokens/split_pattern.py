r"""How text is cut before byte-pair encoding: patterns for Chinese, English and code.

Merges never cross a cut, so the cuts decide which tokens can exist. GPT-2's pattern takes a Chinese
clause up to the next punctuation mark as one piece: nearly every piece is then distinct, and counting
them fills memory without saving work. Here

- Han characters stand apart from other letters and from punctuation. While the merges are learned, a run
  of them is cut at every second character; when text is encoded, it stays whole. Learning so takes a third
  of the memory and sees the pairs that most Chinese words are; encoding lets these pairs fall where the
  words are, which needs fewer tokens than cutting there too (``docs/tokenizer.md`` has the numbers).
- a word takes one sign or space before it (``" the"``, ``".append"``, ``"(self"``), its ``'s`` or ``'t``
  after it, and camelCase is cut at the capital.
- digits go in groups of at most three.
- other signs stay together, with the line breaks that follow them.
- line breaks end a piece, and indentation keeps all its spaces but the last, which goes to the word.

The pattern for encoding is, sign for sign, the one of Moonshot AI's Kimi K2, because fast encoders
recognise it and cut by hand-written code instead of a regular expression: twice as fast on English.
"""

from __future__ import annotations

HAN_RUN_LEARNING = 2

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_AFTER_WORD = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def split_pattern(han_run: int | None = None) -> str:
    """The regular expression whose matches are the pieces of a text.

    Args:
        han_run: the most Han characters in one piece; ``None`` sets no limit, as when text is encoded.
    """
    return "|".join(
        [
            r"[\p{Han}]+" if han_run is None else rf"[\p{{Han}}]{{1,{han_run}}}",
            f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_AFTER_WORD}",
            f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_AFTER_WORD}",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern (Radford et al. 2019), for comparison and for reading its tokenizers."""

_GPT4_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT4_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4_PATTERN = rf"{_GPT4_WORDS}|\p{{N}}{{1,3}}{_GPT4_REST}"
"""The pattern of GPT-4 and Llama 3."""
QWEN2_PATTERN = rf"{_GPT4_WORDS}|\p{{N}}{_GPT4_REST}"
"""The pattern of Qwen 2 and 3."""
BLOOM_PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"
"""BLOOM's pattern (arXiv 2211.05100)."""

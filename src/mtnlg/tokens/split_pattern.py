r"""How text is cut before byte-pair encoding: a pattern for Chinese, English and code.

Merges never cross a cut, so the cuts decide which tokens can exist. GPT-2's pattern takes a Chinese
clause up to the next punctuation mark as one piece: nearly every piece is then distinct, and counting
them fills memory without saving work. Here

- a run of Han characters is cut after 2 characters while the merges are learned, and after 8 when text is
  encoded. Learning sees the pairs that most Chinese words are, in a third of the memory; encoding lets
  those pairs fall where the words are, which takes fewer tokens than cutting at every second character.
- a word takes one space or one ASCII sign before it (``" the"``, ``".append"``, ``"(self"``, ``"'t"``).
- digits go in groups of at most three.
- other signs stay together, with the line break that follows them.
- line breaks end a piece, and indentation keeps all its spaces but the last, which goes to the word.

Every engine that we use reads the pattern alike: there are no case-insensitive groups and no
look-behind, and the only look-ahead is one character wide.
"""

from __future__ import annotations

HAN_RUN_LEARNING = 2
HAN_RUN_ENCODING = 8


def split_pattern(han_run: int = HAN_RUN_ENCODING) -> str:
    """The regular expression whose matches are the pieces of a text.

    Args:
        han_run: the most Han characters in one piece.
    """
    return "|".join(
        [
            rf"\p{{Han}}{{1,{han_run}}}",
            r"[ !-/:-@\[-`{-~]?[\p{L}\p{M}&&[^\p{Han}]]+",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern (Radford et al. 2019), for comparison and for reading its tokenizers."""

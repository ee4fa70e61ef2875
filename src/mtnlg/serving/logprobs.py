"""How likely tokens were, in the two forms that OpenAI's endpoints have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtnlg.generation.request import TokenLogprobs
from mtnlg.serving.vocabulary import Vocabulary

LEAST = -9999.0  # JSON has no minus infinity


def legacy(
    vocabulary: Vocabulary,
    tokens: Sequence[int],
    found: Sequence[TokenLogprobs],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """``logprobs`` of a completion: parallel lists. A first token of a prompt has ``null``.

    Args:
        vocabulary: names of tokens.
        tokens: chosen, or of the prompt.
        found: how likely each was.
        offsets: characters before each in the text that is answered.
    """
    return {
        "tokens": [vocabulary.name_of(token) for token in tokens],
        "token_logprobs": [_finite(entry.logprob) for entry in found],
        "top_logprobs": [_top(vocabulary, token, entry) for token, entry in zip(tokens, found)],
        "text_offset": list(offsets),
    }


def _top(vocabulary: Vocabulary, token: int, entry: TokenLogprobs) -> dict[str, float] | None:
    """By name, likeliest first; the chosen token is among them even where it is not likely."""
    if entry.logprob is None:
        return None
    names: dict[str, float] = {}
    for other, logprob in (*entry.top, (token, entry.logprob)):
        # Two tokens of one name: the likelier stays, so that the greatest number is that of the best.
        names.setdefault(vocabulary.name_of(other), max(logprob, LEAST))
    return names


def chat(vocabulary: Vocabulary, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    """An entry of ``logprobs.content`` of a chat answer."""
    return {
        **_named(vocabulary, token, entry.logprob),
        "top_logprobs": [_named(vocabulary, other, logprob) for other, logprob in entry.top],
    }


def _named(vocabulary: Vocabulary, token: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": vocabulary.name_of(token),
        "logprob": _finite(logprob),
        "bytes": list(vocabulary.bytes_of(token)),
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)

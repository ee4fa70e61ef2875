from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mtnlg.generation import IncrementalDecoder, continuation_text

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = IncrementalDecoder(decode_bytes, context or [])
    return [decoder.push(token) for token in ids]


@given(st.text())
def test_pieces_add_up_and_never_split_a_character(text: str):
    pieces = stream(list(text.encode("utf-8")))
    assert "".join(pieces) == text.removesuffix(REPLACEMENT)
    assert sum(piece != "" for piece in pieces) == len(text.removesuffix(REPLACEMENT))


@given(st.text(max_size=5), st.binary(max_size=40))
def test_any_bytes_add_up_to_their_decoding_but_for_half_a_character(prompt: str, raw: bytes):
    context = list(prompt.encode())
    text = "".join(stream(list(raw), context))
    assert text == decode_bytes(list(raw)).removesuffix(REPLACEMENT)
    assert text == continuation_text(decode_bytes, context, list(raw))


def test_a_character_comes_out_with_its_last_byte():
    assert stream(list("a秋🌙".encode())) == ["a", "", "", "秋", "", "", "", "🌙"]


def test_broken_bytes_do_not_hold_back_what_follows():
    pieces = stream([0xFF, 0xFF, 0xFF, *b"ok"])
    assert pieces[1] == REPLACEMENT  # the first is certain once the second comes
    assert "".join(pieces) == REPLACEMENT * 3 + "ok"


def test_a_decoder_that_needs_its_neighbour():
    """Some tokenizers drop the space before a sequence's first word."""
    words = ["▁one", "▁two", "▁three"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    decoder = IncrementalDecoder(decode)
    assert [decoder.push(token) for token in (0, 1, 2)] == ["one", " two", " three"]
    assert IncrementalDecoder(decode, [0]).push(1) == " two"
    assert continuation_text(decode, [0], [1, 2]) == " two three"

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtnlg.generation import IncrementalDecoder, TextStream, continuation_text
from mtnlg.tokens import Tokenizer

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


# -- stop strings

TEXTS = [
    "秋天的夜晚，星光闪烁。",
    "User: hi\nBot: 你好 👩‍👩‍👧‍👦🏳️‍🌈!",
    "aab aabab\r\n\r\n",
    "naïve 😀é",
] * 10


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def first_stop(text: str, stops: list[str], least: int = 0) -> tuple[str, str | None]:
    """The whole text, one character at a time: where it ends, and by which string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if stop and end > least and text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run_stream(ids: list[int], stops: list[str], **options: bool) -> tuple[list[str], TextStream]:
    text_stream = TextStream(tokenizer().decode, stop=stops, **options)
    pieces = []
    for token in ids:
        pieces.append(text_stream.push(token))
        if text_stream.is_stopped:
            return pieces, text_stream
    return [*pieces, text_stream.finish()], text_stream


letters = st.text(alphabet="ab\n:é你👩\u200d😀 Us", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab\n:é你😀\u200d", min_size=1, max_size=4), max_size=4)


@settings(max_examples=300, deadline=None)
@given(letters, stop_lists, st.booleans())
def test_stop_strings_equal_the_search_of_the_whole_text(text, stops, include):
    ids = tokenizer().encode(text)
    pieces, text_stream = run_stream(ids, stops, include_stop=include)
    before, stop = first_stop(text, stops)
    assert text_stream.stopped_by == stop
    assert "".join(pieces) == before + (stop if include and stop else "")
    assert REPLACEMENT not in "".join(pieces)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(alphabet="abc", max_size=6), max_size=6), stop_lists | st.just(["b", "ab", "ca"]))
def test_tokens_of_any_length_stop_at_the_same_place(words, stops):
    """Several stop strings may come whole in one token."""
    text_stream = TextStream(lambda ids: "".join(words[i] for i in ids), stop=stops)
    text = ""
    for number in range(len(words)):
        text += text_stream.push(number)
        if text_stream.is_stopped:
            break
    else:
        text += text_stream.finish()
    assert (text, text_stream.stopped_by) == first_stop("".join(words), stops)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(8, 299), max_size=40), stop_lists)
def test_any_ids_give_the_text_of_the_whole(ids, stops):
    """Ids drawn at random make broken characters anywhere."""
    pieces, text_stream = run_stream(ids, stops)
    whole = continuation_text(tokenizer().decode, [], ids)
    before, stop = first_stop(whole, stops)
    assert ("".join(pieces), text_stream.stopped_by) == (before, stop)


@settings(max_examples=200, deadline=None)
@given(letters, stop_lists)
def test_what_comes_out_early_is_never_taken_back_and_nothing_waits_without_need(text, stops):
    text_stream = TextStream(tokenizer().decode, stop=stops)
    ids, sent = tokenizer().encode(text), ""
    for count, token in enumerate(ids, 1):
        sent += text_stream.push(token)
        if text_stream.is_stopped:
            break
        known = continuation_text(tokenizer().decode, [], ids[:count])
        waiting = known.removeprefix(sent)
        assert known == sent + waiting
        assert waiting == "" or any(stop.startswith(waiting) for stop in stops)


def test_a_stop_string_that_may_not_stop_yet_stays_in_the_text():
    text_stream = TextStream(decode_bytes, stop=["ab", "xabc"], min_tokens=8)
    assert "".join(text_stream.push(token) for token in b"-ab-xab") == "-ab-"  # xab may go on
    assert text_stream.push(ord("-")) == "xab-"
    assert not text_stream.is_stopped
    assert [text_stream.push(token) for token in b"ab"] == ["", ""]
    assert text_stream.stopped_by == "ab"


@pytest.mark.parametrize("min_tokens", [1, 2])
def test_a_stop_string_begun_too_early_and_completed_in_time_stops(min_tokens):
    text_stream = TextStream(decode_bytes, stop=["ab"], min_tokens=min_tokens)
    assert text_stream.push(ord("a")) == ""
    assert text_stream.push(ord("b")) == ""
    assert text_stream.is_stopped


@pytest.mark.parametrize("ids", [[0x80], [0xE7, 0xA7, 0x8B], [0xF0, 0x9F], [ord("a")]])
def test_the_work_of_a_token_does_not_grow(ids):
    lengths = []

    def decode(given: list[int]) -> str:
        lengths.append(len(given))
        return decode_bytes(given)

    text_stream = TextStream(decode, prompt_ids=list("秋".encode()) * 2000, stop=["stop"])
    lengths.clear()
    for _ in range(500):
        for token in ids:
            text_stream.push(token)
    assert max(lengths) <= 40
    assert sum(lengths) < 150 * 500 * len(ids)


def test_ids_without_text_are_passed_over():
    text_stream = TextStream(lambda ids: "".join(" w" for i in ids if i).removeprefix(" "), [0])
    pieces = [text_stream.push(token) for token in [1] + [0] * 50 + [1]]
    assert pieces == ["w"] + [""] * 50 + [" w"]

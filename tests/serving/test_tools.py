"""Calls in what a model writes: found whole, in pieces of any size, and never where there are none."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.serving.chat_answer import Stripper
from mtnlg.serving.tools import Call, Piece, ToolReader, call_grammar, joined

ROME = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
CASES = {
    "hello": ["hello"],
    ROME: [("weather", {"city": "Rome"})],
    f"Let me see. {ROME}": ["Let me see. ", ("weather", {"city": "Rome"})],
    f"{ROME}\n{ROME}": [("weather", {"city": "Rome"})] * 2,
    f"{ROME} done": [("weather", {"city": "Rome"}), " done"],
    '{"name": "weather", "parameters": {"city": "Oslo"}}': [("weather", {"city": "Oslo"})],
    ' {"name": "weather", "arguments": {}}\n': [("weather", {})],
    '{"name": "other", "arguments": {}}': ['{"name": "other", "arguments": {}}'],
    '{"weather": 5}': ['{"weather": 5}'],
    "<tool_call>no json</tool_call>": ["<tool_call>no json</tool_call>"],
    '<tool_call>{"name": "other"}</tool_call>': ['<tool_call>{"name": "other"}</tool_call>'],
    '<tool_call>{"name": "weather"': ['<tool_call>{"name": "weather"'],
    '<tool_call>{"name": "weather"}': [("weather", {})],
    "a < b <tool_ and <tool_call": ["a < b <tool_ and <tool_call"],
    "": [],
    "\n": ["\n"],
}


def content_of(arguments):
    """The JSON, or the text where a model wrote none."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def read(pieces):
    """Texts joined, calls as (name, arguments)."""
    reader = ToolReader(["weather"])
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    found = []
    for part in joined(parts):
        if isinstance(part, Call):
            found.append((part.name, content_of(part.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("text", CASES)
def test_calls_are_found(text):
    assert read([text]) == CASES[text]


@given(st.sampled_from([text for text in CASES if text]), st.lists(st.integers(0, 90), max_size=12))
def test_pieces_say_what_the_whole_says(text, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(places)]
    assert read(pieces) == CASES[text]


@pytest.mark.parametrize("name", ["arguments", "parameters"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_arguments_are_handed_on_as_they_come(name, is_bare):
    arguments = '{"city": "a }\\" b", "days": [{"n": 1}, {}]}'
    text = f'{{"name": "weather", "{name}": {arguments}}}'
    text = text if is_bare else f"<tool_call>\n{text}\n</tool_call>"
    reader = ToolReader(["weather"])
    parts = [(place, part) for place, letter in enumerate(text) for part in reader.push(letter)]
    assert reader.finish() == []
    begin = text.index(arguments)
    expected = [(begin, Call("weather"))]
    expected += [(begin + place, Piece(letter)) for place, letter in enumerate(arguments)]
    assert parts == expected
    assert reader.num_calls == 1


def test_a_call_that_breaks_off_keeps_what_it_has():
    reader = ToolReader(["weather"])
    parts = reader.push('<tool_call>{"name": "weather", "arguments": {"city": "Ro') + reader.finish()
    assert joined(parts) == [Call("weather", '{"city": "Ro')]


FRAGMENTS = [
    '{"name": "weather", "arguments": {"a": [',
    "}}",
    "<tool_call>",
    "</tool_call>",
    "{",
    '{"name": "weather"}',
    " ",
    "\n",
    "a",
    "<",
    "tool_call>",
    ROME,
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8))
def test_whatever_is_written_is_read_alike_letter_by_letter(fragments):
    assert read("".join(fragments)) == read(["".join(fragments)])


@given(st.lists(st.text("ab \n\t", max_size=4), max_size=8))
def test_a_stripped_stream_is_the_stripped_whole(pieces):
    stripper = Stripper()
    assert "".join(stripper.push(piece) for piece in pieces) == "".join(pieces).strip()


def test_a_grammar_names_every_tool():
    from mtnlg.serving.chat_schemas import Tool

    tools = [Tool.model_validate({"type": "function", "function": {"name": name}}) for name in ("a", "b")]
    grammar = call_grammar(tools)
    assert '"const": "a"' in grammar
    assert "call_0 | call_1" in grammar

"""Calls in what a model writes: found whole, in pieces of any size, and never where there are none."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtnlg.serving.chat_answer import Stripper
from mtnlg.serving.tools import Call, ToolReader, call_grammar

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


def read(pieces):
    """Texts joined, calls as (name, arguments)."""
    reader = ToolReader(["weather"])
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    found = []
    for part in parts:
        if isinstance(part, Call):
            found.append((part.name, json.loads(part.arguments)))
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


FRAGMENTS = [
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

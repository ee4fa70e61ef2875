import json
import re
import sys

import numpy as np
import pytest
import torch
from tests.generation.constraints.models import SPARE_IDS, generate, make_engine, make_tokenizer

from mtnlg.config import ConfigError
from mtnlg.config.errors import MtnlgError
from mtnlg.generation.constraints import constraint_from_options, default_end_ids
from mtnlg.tokens import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "名": {"type": "string", "pattern": "^[\u4e00-\u9fa5]{2,4}$"},
        "mood": {"enum": ["happy", "悲伤", "😀"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 3,
        },
        "ok": {"type": "boolean"},
    },
    "required": ["名", "mood", "sizes", "ok"],
    "additionalProperties": False,
}
SUMS = """
start: sum
sum: number ("+" number)~1..3
number: DIGIT | "(" sum ")"
DIGIT: /[0-9]{1,2}/
"""
SUMS_GBNF = 'root ::= digit ("+" digit)? ("甲" | "乙")\ndigit ::= [0-9] [0-9]?\n'


def compile_rule(tokenizer, kind, value=None, **options):
    return constraint_from_options(tokenizer, tokenizer.vocab_size + SPARE_IDS, kind, value, **options)


def allowed_tokens(state, tokenizer):
    words = torch.zeros(-(-(tokenizer.vocab_size + SPARE_IDS) // 32), dtype=torch.int32)
    state.fill_mask(words)
    return set(np.flatnonzero(np.unpackbits(words.numpy().view(np.uint8), bitorder="little")).tolist())


def takes(tokenizer, constraint, text):
    """Whether the rule allows the text, and as a whole."""
    state = constraint.start()
    for token in tokenizer.encode(text):
        if token not in allowed_tokens(state, tokenizer):
            return False
        state.accept(token)
    return state.is_complete or bool(allowed_tokens(state, tokenizer) & set(default_end_ids(tokenizer)))


# -- a model that knows nothing keeps every rule


def test_answers_have_the_schema(tokenizer):
    found = generate(make_engine(tokenizer), [compile_rule(tokenizer, "json_schema", SCHEMA)] * 6)
    for generation in found:
        assert generation.finish_reason == "stop"
        answer = json.loads(generation.text)
        assert set(answer) == set(SCHEMA["properties"])
        assert re.fullmatch("[\u4e00-\u9fa5]{2,4}", answer["名"])
        assert answer["mood"] in SCHEMA["properties"]["mood"]["enum"]
        assert all(isinstance(size, int) and 0 <= size <= 99 for size in answer["sizes"])
        assert len(answer["sizes"]) <= 3 and isinstance(answer["ok"], bool)


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[a-z]{2}", r"(春|夏|秋|冬)天.{2}[。！]", r"^[0-9]{1,4}元\p{Han}?$", "é+😀"]
)
def test_answers_match_the_expression(tokenizer, pattern):
    ends = default_end_ids(tokenizer)
    found = generate(make_engine(tokenizer), [compile_rule(tokenizer, "regex", pattern)] * 4, end_ids=ends)
    for generation in found:
        assert generation.finish_reason in ("stop", "end")
        assert re.fullmatch(pattern.replace(r"\p{Han}", "[\u3005-\U000323af]"), generation.text)


def test_answers_are_of_the_grammar_or_the_choice(tokenizer):
    choices = ["yes", "no", "也许", 'a "quoted"\nline', "yes indeed"]
    ends = default_end_ids(tokenizer)
    rules = [compile_rule(tokenizer, "grammar", SUMS), compile_rule(tokenizer, "grammar", SUMS_GBNF)]
    rules += [compile_rule(tokenizer, "choice", choices)] * 6
    sums, gbnf, *chosen = generate(make_engine(tokenizer), rules, end_ids=ends)
    if sums.finish_reason != "length":
        assert re.fullmatch(r"[0-9+()]+", sums.text) and eval(sums.text.replace("0", "1")) > 0
    assert re.fullmatch(r"\d\d?(\+\d\d?)?[甲乙]", gbnf.text)
    assert {generation.text for generation in chosen} <= set(choices)
    assert len({generation.text for generation in chosen}) > 1


# -- what may come when


def test_an_end_token_only_where_the_rule_is_complete(tokenizer):
    ends = set(default_end_ids(tokenizer))
    constraint = compile_rule(tokenizer, "choice", ["a", "ab"])
    state = constraint.start()
    assert not allowed_tokens(state, tokenizer) & ends
    state.accept(tokenizer.encode("a")[0])
    assert not state.is_complete and allowed_tokens(state, tokenizer) >= ends
    state.accept(tokenizer.encode("b")[0])
    assert state.is_complete and allowed_tokens(state, tokenizer) == ends


def test_ids_that_the_tokenizer_has_not_are_never_allowed(tokenizer):
    state = compile_rule(tokenizer, "regex", "(?s:.*)").start()
    assert max(allowed_tokens(state, tokenizer)) < tokenizer.vocab_size
    assert len(allowed_tokens(state, tokenizer)) > 1000


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_object", None, '{"a": [1, {"b": "秋\\n😀"}]}', "[1]"),
        ("json_schema", {"type": "object"}, '{\n  "a": 1\n}', '{  "a": 1}'),
        ("json_schema", '{"enum": ["春", "秋"]}', '"秋"', '"冬"'),
        ("json_schema", True, "null", "nul"),
        ("regex", "[^a]{2}", "龘😀", "龘a"),
        ("grammar", SUMS, "1+(2+33)", "1+"),
    ],
)
def test_texts_that_are_allowed_and_not(tokenizer, kind, value, good, bad):
    constraint = compile_rule(tokenizer, kind, value)
    assert takes(tokenizer, constraint, good) and not takes(tokenizer, constraint, bad)


def test_white_space_comes_to_an_end(tokenizer):
    state = compile_rule(tokenizer, "json_object").start()
    for token in tokenizer.encode("{"):
        state.accept(token)
    taken = 0
    space = [tokenizer.encode(text)[0] for text in (" ", "\n", "\t")]
    while allowed := allowed_tokens(state, tokenizer) & set(space):
        state.accept(min(allowed, key=space.index) if taken else space[1])
        taken += 1
        assert taken < 50


def test_a_copy_goes_its_own_way(tokenizer):
    state = compile_rule(tokenizer, "choice", ["ab", "ac"]).start()
    state.accept(tokenizer.encode("a")[0])
    copy = state.copy()
    copy.accept(tokenizer.encode("b")[0])
    assert copy.is_complete and not state.is_complete
    state.accept(tokenizer.encode("c")[0])
    assert state.is_complete
    with pytest.raises(MtnlgError, match="rule that guides generation failed"):
        copy.accept(tokenizer.encode("c")[0])


def test_an_answer_cut_short_says_so():
    tokenizer = make_tokenizer()
    rule = compile_rule(tokenizer, "json_schema", SCHEMA)
    (found,) = generate(make_engine(tokenizer), [rule], max_new_tokens=3)
    assert found.finish_reason == "length" and len(found.new_ids) == 3


# -- what users may get wrong


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", '{"type":', "the JSON schema cannot be used: Expecting value: line 1 column 9"),
        ("json_schema", {"type": "objekt"}, "Invalid type: objekt"),
        ("json_schema", [1], "it must be an object"),
        ("json_schema", {"$ref": "https://example.com/x"}, "the JSON schema cannot be used"),
        (
            "json_schema",
            {"type": "object", "unevaluatedProperties": False},
            'Properties" cannot be kept',
        ),
        ("json_schema", {"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ("json_schema", {"a": {1, 2}}, "not JSON serializable"),
        ("json_schema", {"description": "a" * 1_000_001}, "more than 1,000,000"),
        ("json_schema", {"enum": []}, "anyOf is empty"),
        ("regex", "ab[a-", r"used: unclosed character class \(at character 3 of ab\[a-\)\.$"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "", "not empty"),
        ("regex", 7, "not empty, not 7"),
        ("grammar", "start: words", "unknown name"),
        ("grammar", "start: start", "used: no text keeps it"),
        ("grammar", "root ::= words", "read as GBNF"),
        ("grammar", "hello", "read as GBNF"),
        ("choice", [], "list of texts"),
        ("choice", "ab", "list of texts"),
        ("choice", ["a", ""], "list of texts"),
        ("poem", None, "choose one of json_schema"),
    ],
)
def test_rules_that_cannot_be_used(kind, value, message):
    with pytest.raises(ConfigError, match=message):
        compile_rule(make_tokenizer(), kind, value)


def test_without_an_end_token_one_must_be_named():
    nameless = Tokenizer(make_tokenizer().definition.replace("<|end", "<|fin"))
    with pytest.raises(ConfigError, match="give end_ids"):
        compile_rule(nameless, "regex", "a")
    assert takes(nameless, compile_rule(nameless, "regex", "a", end_ids=[3]), "a")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r'pip install "mtnlg\[guided\]"'):
        compile_rule(make_tokenizer(), "regex", "abcdef")


def test_the_same_rule_is_compiled_once():
    tokenizer = make_tokenizer()
    first = compile_rule(tokenizer, "json_schema", SCHEMA)
    assert compile_rule(tokenizer, "json_schema", json.dumps(SCHEMA)) is first

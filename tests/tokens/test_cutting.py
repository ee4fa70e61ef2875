"""Long texts are cut only where the tokens stay the same."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens.test_encoders import MIXED
from tests.tokens.texts import PROSE, TEXTS, small_tokenizer

from mtnlg.tokens import Tokenizer
from mtnlg.tokens.cutting import Cutter, cut
from mtnlg.tokens.encode_task import cutting_of
from mtnlg.tokens.split_pattern import GPT2_PATTERN, GPT4_PATTERN, QWEN2_PATTERN
from mtnlg.tokens.tokenizer import SPECIAL_TOKENS
from mtnlg.tokens.training import learn_definition

PATTERNS = {"own": None, "gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "qwen2": QWEN2_PATTERN}
WORDS = st.lists(
    st.sampled_from(["a b", "x\ny", "。秋", " ", "\n", "1", "秋天", "！", "it's", "é c"]), max_size=20
)


@pytest.mark.parametrize("name", PATTERNS)
def test_parts_encode_as_the_whole(name: str) -> None:
    tokenizer = small_tokenizer()
    if PATTERNS[name]:
        tokenizer = Tokenizer(learn_definition(TEXTS, 350, SPECIAL_TOKENS, pattern=PATTERNS[name]))
    own, cuttable = cutting_of(tokenizer)
    assert (own, cuttable) == (name == "own", True)

    @settings(max_examples=150, deadline=None)
    @given(MIXED | WORDS.map("".join), st.integers(1, 6))
    def same(text: str, characters: int) -> None:
        parts = list(cut(text, characters, own))
        assert "".join(parts) == text
        assert [*chain.from_iterable(map(tokenizer.encode, parts))] == tokenizer.encode(text)
        cutter = Cutter(own)
        blocks = [text[i : i + characters] for i in range(0, len(text), characters)]
        fed = [*map(cutter.feed, blocks), cutter.rest()]
        assert "".join(fed) == text
        assert [*chain.from_iterable(map(tokenizer.encode, fed))] == tokenizer.encode(text)

    same()


def test_a_long_text_is_cut_near_the_size_asked_for() -> None:
    text = PROSE * 100
    parts = list(cut(text, 200))
    assert max(map(len, parts)) < 250
    assert list(cut("", 10)) == []
    assert list(cut("啊" * 1000, 10)) == ["啊" * 1000]


def test_unknown_pieces_are_not_cut() -> None:
    odd = Tokenizer(learn_definition(TEXTS, 350, SPECIAL_TOKENS, pattern=r"\w{1,5}|\W"))
    assert cutting_of(odd) == (False, False)
    cutter = Cutter(cuttable=False)
    assert [cutter.feed("a b c"), cutter.feed("\nd"), cutter.rest()] == ["", "", "a b c\nd"]

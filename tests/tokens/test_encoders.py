"""The fast encoders give the ids of ``tokenizers``, and a wrong one is not used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens.texts import TEXTS, small_tokenizer

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens import encoders
from mtnlg.tokens.encoders import ENGINES, CheckedEncoder, agrees

# Pieces that patterns treat differently, in every order.
PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "a",
    "B",
    "Don't",
    "'s",
    "12",
    "7890",
    "秋",
    "天夜晚",
    "，",
    "。」",
    "ひ",
    "ไ",
]
PARTS += [
    "_",
    "(",
    ".",
    "…",
    "e\u0301",
    "\u0301",
    "👩‍👩",
    "ǅ",
    "\u3000",
    "\xa0",
    "\x00",
    "〇",
    "々",
    "<|user|>",
    "ſ",
    "Ⅷ",
]
MIXED = st.lists(st.sampled_from(PARTS), max_size=20).map("".join)


def engine_or_skip(name: str) -> CheckedEncoder:
    if name != "tokenizers":
        pytest.importorskip(name)
    return CheckedEncoder(small_tokenizer(), name)


@pytest.mark.parametrize("name", ENGINES)
def test_ids_are_those_of_tokenizers(name: str) -> None:
    encoder = engine_or_skip(name)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(MIXED | st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
    def same(texts: list[str]) -> None:
        ids, lengths = encoder(texts)
        rows = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
        assert [row.tolist() for row in rows] == small_tokenizer().encode_batch(texts)

    same()
    assert agrees(encoder, small_tokenizer(), TEXTS)


def test_an_engine_that_errs_is_left_out(monkeypatch) -> None:
    class Wrong(encoders._CoreEncoder):
        name = "splintr"

        def __call__(self, texts):
            ids, lengths = super().__call__(texts)
            return ids[::-1], lengths

    monkeypatch.setitem(encoders._MAKERS, "splintr", Wrong)
    assert CheckedEncoder(small_tokenizer()).name != "splintr"
    with pytest.raises(ConfigError, match="gives other ids"):
        CheckedEncoder(small_tokenizer(), "splintr")


def test_an_engine_that_errs_on_the_input_is_caught() -> None:
    encoder = CheckedEncoder(small_tokenizer(), "tokenizers")
    honest = encoder._engine

    def dishonest(texts):
        ids, lengths = honest(texts)
        return ids + 1, lengths

    encoder._engine, encoder.name = dishonest, "splintr"
    with pytest.raises(DataError, match="disagrees with tokenizers"):
        encoder(["some text"])


def test_a_missing_engine_is_named(monkeypatch) -> None:
    def missing(tokenizer):
        raise ImportError("no such package")

    for name in ("splintr", "tiktoken"):
        monkeypatch.setitem(encoders._MAKERS, name, missing)
    assert CheckedEncoder(small_tokenizer()).name == "tokenizers"
    with pytest.raises(ConfigError, match="not installed"):
        CheckedEncoder(small_tokenizer(), "tiktoken")
    with pytest.raises(ConfigError, match="choose auto"):
        CheckedEncoder(small_tokenizer(), "magic")

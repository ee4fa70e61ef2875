"""The tokenizer: exact round trips, reserved tokens, a folder that others load, the same every time."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens.texts import CODE, ENGLISH, PROSE, TEXTS, VERSE, small_tokenizer

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.encoders import PROBES

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_every_unicode_text_comes_back(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", PROBES)
def test_awkward_texts_come_back(text: str) -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_first_ids_and_their_names_in_text_are_text() -> None:
    tokenizer = small_tokenizer()
    names = ["<|endoftext|>", "<|padding|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert tokenizer.special_tokens == {name: index for index, name in enumerate(names)}
    assert (tokenizer.end_of_text_id, tokenizer.padding_id) == (0, 1)
    sly = "hello <|user|> there"
    assert not set(tokenizer.encode(sly)) & set(range(6))
    assert tokenizer.decode(tokenizer.encode(sly)) == sly
    spoken = tokenizer.encode(sly, allow_special=True)
    assert spoken.count(3) == 1
    assert tokenizer.decode(spoken) == "hello  there"
    assert tokenizer.decode(spoken, skip_special_tokens=False) == sly


def test_tensors_in_and_out() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(VERSE, return_tensors="pt")
    assert ids.dtype == torch.long
    assert ids.tolist() == [tokenizer.encode(VERSE)]
    assert tokenizer.decode(ids) == tokenizer.decode(ids[0]) == VERSE
    with pytest.raises(ConfigError, match="one row"):
        tokenizer.decode(torch.cat([ids, ids]))
    with pytest.raises(ConfigError, match="negative"):
        tokenizer.decode([-1])
    with pytest.raises(ConfigError, match="return_tensors"):
        tokenizer.encode("x", return_tensors="np")  # type: ignore[call-overload]


def test_pieces_respect_chinese_words_digits_and_code() -> None:
    tokenizer = Tokenizer.train([*TEXTS, "123456789 " * 50], 1000)
    tokens = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    han = [token for token in tokens if token and all("一" <= c <= "鿿" for c in token)]
    assert max(map(len, han)) == 2  # learned in pairs, though every line is repeated
    assert max(len(token) for token in tokens if token.isdigit()) == 3
    assert {" fox", ".width", "(self", "\n\n\n"} <= set(tokens)


def test_the_same_texts_give_the_same_tokenizer_in_whatever_pieces() -> None:
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again.definition == small_tokenizer().definition
    joined = Tokenizer.train(["".join(TEXTS)], 400)
    assert joined.fingerprint == small_tokenizer().fingerprint
    assert Tokenizer.train(TEXTS, 380).fingerprint != small_tokenizer().fingerprint


def test_save_and_load(tmp_path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tok")
    for path in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        loaded = Tokenizer.from_pretrained(path)
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.vocab_size, loaded.end_of_text_id, loaded.padding_id) == (400, 0, 1)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(PROSE) == tokenizer.encode(PROSE)
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    # Settings of others survive a round.
    config["model_max_length"] = 512
    config["chat_template"] = "{{ messages }}"
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_pretrained(tmp_path / "tok").save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert kept["model_max_length"] == 512
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_transformers_loads_the_same_ids(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ordinary = [text for text in (*PROBES, *TEXTS[:4]) if "<|" not in text]
    for text in ordinary:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 1, 400)
    assert theirs("<|user|>hi<|end|>")["input_ids"] == tokenizer.encode(
        "<|user|>hi<|end|>", allow_special=True
    )


def test_what_cannot_be_trained_or_loaded_says_why(tmp_path) -> None:
    with pytest.raises(ConfigError, match="at least 262"):
        Tokenizer.train(TEXTS, 261)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train(["", ""], 400)
    with pytest.raises(DataError, match=r"there is no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="not valid Unicode"):
        small_tokenizer().encode("half a pair: \ud800")


def test_a_small_text_gives_fewer_tokens_than_asked_for() -> None:
    tokenizer = Tokenizer.train(["abab"], 1000)
    assert 262 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode(ENGLISH)) == ENGLISH


def test_characters_per_token() -> None:
    tokenizer = small_tokenizer()
    count = len(tokenizer.encode(PROSE)) + len(tokenizer.encode(VERSE))
    assert tokenizer.characters_per_token([PROSE, VERSE]) == (len(PROSE) + len(VERSE)) / count

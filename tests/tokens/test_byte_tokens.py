"""Tokens that are bytes, as SentencePiece models of Llama's kind have them: whole, cut and wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models

from mtnlg.generation.text import REPLACEMENT, IncrementalDecoder
from mtnlg.tokens import Tokenizer

PIECES = ["▁", "▁a", "好"]


@pytest.fixture(scope="module")
def tokenizer():
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "a"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Core(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    core.add_special_tokens(["<s>"])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return Tokenizer(core.to_str())


def ids_of(tokenizer, parts):
    core = tokenizer._core
    names = [[part] if isinstance(part, str) else [f"<0x{byte:02X}>" for byte in part] for part in parts]
    return [core.token_to_id(name) for group in names for name in group]


PARTS = st.lists(
    st.sampled_from([*PIECES, "<s>"])
    | st.binary(max_size=5)
    | st.text("é你👩\u200d🏽", max_size=3).map(str.encode),
    max_size=6,
)


@given(PARTS)
def test_any_bytes_decode_as_utf8_does_and_stream_in_whole_characters(tokenizer, parts):
    raw = b"".join(part if isinstance(part, bytes) else part.replace("▁", " ").encode() for part in parts)
    expected = raw.replace(b"<s>", b"").decode(errors="replace")
    ids = ids_of(tokenizer, ["a", *parts])
    assert tokenizer.decode(ids) == "a" + expected
    decoder = IncrementalDecoder(tokenizer.decode, ids_of(tokenizer, ["<s>", "a"]))
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) == ("a" + expected).removesuffix(REPLACEMENT)


def test_what_the_library_decodes_stays_as_it_is(tokenizer):
    ids = ids_of(tokenizer, ["<s>", "▁a", "👩\u200d👧".encode(), "▁", "你好".encode(), "好"])
    assert tokenizer.decode(ids) == tokenizer._core.decode(ids) == "a👩\u200d👧 你好好"
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer._core.decode(ids, False)
    broken = [*ids, *ids_of(tokenizer, [b"\xf0\x9f"])]
    assert tokenizer.decode(broken) == "a👩\u200d👧 你好好" + REPLACEMENT
    assert not Tokenizer.train(["a b"] * 9, 300)._byte_tokens

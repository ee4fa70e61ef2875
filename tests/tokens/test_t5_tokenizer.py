"""SentencePiece files without SentencePiece: the same ids, and damaged files named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from mtnlg.config import ConfigError, DataError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.sentencepiece_file import definition_of, read_sentencepiece
from mtnlg.tokens.t5_tokenizer import T5Tokenizer

TEXTS = Path(__file__).parents[2] / "data" / "zh"
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "ＡＢＣ　ｄｅｆ ①②",
    "a\nb\tc",
    "🙂 龘",
    "x" * 50,
    "▁a ▁",
    "人工智能的未来？",
]
LINES = [line for path in sorted(TEXTS.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module", params=[False, True], ids=["unknown", "bytes"])
def folder(request, tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece", reason="is the reference, and makes the file")
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES if line.strip()]),
        model_prefix=str(folder / "spiece"),
        vocab_size=2100,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=request.param,
        num_threads=1,
        character_coverage=0.98,
        minloglevel=2,
    )
    return folder


def test_ids_and_texts_are_sentencepieces(folder):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ours = T5Tokenizer.from_pretrained(folder)
    for text in [*LINES[:300], *ODD]:
        ids = ours.encode(text)
        assert ids[-1] == ours.end_of_text_id == theirs.eos_id()
        assert ids[:-1] == theirs.encode(text)
        if theirs.unk_id() not in ids:  # theirs writes a sign for it, ours leaves it out
            assert ours.decode(ids) == theirs.decode(ids[:-1])
    assert ours.encode_batch(LINES[:5]) == [ours.encode(line) for line in LINES[:5]]


def test_sentinels_follow_the_pieces_the_first_one_last(folder):
    tokenizer = T5Tokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == 2200
    assert tokenizer.encode("<extra_id_0>")[-2] == 2199
    assert tokenizer.encode("海<extra_id_99>")[-2] == 2100
    assert tokenizer.decode([2199, 2100]) == ""
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    assert T5Tokenizer.from_pretrained(folder).vocab_size == 2100
    (folder / "tokenizer_config.json").unlink()


def test_tensors_for_one_text_and_for_several(folder):
    tokenizer = T5Tokenizer.from_pretrained(folder)
    row = tokenizer.encode("海", return_tensors="pt")
    assert row.tolist() == [tokenizer.encode("海")]
    both = tokenizer(["海", "人工智能的未来"])
    assert both["input_ids"].shape == both["attention_mask"].shape
    assert both["input_ids"][0, : row.shape[1]].tolist() == row[0].tolist()
    assert both["attention_mask"][0].sum() == row.shape[1]
    assert not both["input_ids"][0, row.shape[1] :].any()  # padding is 0
    with pytest.raises(ConfigError, match="return_tensors is 'np'"):
        tokenizer.encode("海", return_tensors="np")


def test_saved_it_is_a_tokenizer_json_that_says_the_same(folder, tmp_path):
    tokenizer = T5Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    again = T5Tokenizer.from_pretrained(tmp_path)
    assert [again.encode(text) for text in ODD] == [tokenizer.encode(text) for text in ODD]
    plain = Tokenizer.from_pretrained(tmp_path)
    assert plain.encode("人工智能") == tokenizer.encode("人工智能")[:-1]
    assert plain.core.encode("人工智能").ids == tokenizer.encode("人工智能")  # its template adds the end


def test_what_is_no_sentencepiece_file_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"neither tokenizer.json nor spiece.model is in"):
        T5Tokenizer.from_pretrained(tmp_path)
    whole = (folder / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    for content in (b"", whole[: len(whole) // 2 + 1], b"not a model at all", b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"spiece\.model is no SentencePiece model"):
            T5Tokenizer.from_pretrained(tmp_path)
    path.write_bytes(whole + b"\x12\x02\x18\x02")  # trainer_spec { model_type: BPE }, which wins
    with pytest.raises(DataError, match="is no unigram model"):
        T5Tokenizer.from_pretrained(tmp_path)


def test_a_file_written_by_hand(tmp_path):
    """Every field that is read, in the plainest message: a = 1, b = 2, space and control tokens."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(text: str, score: float, kind: int) -> bytes:
        scored = bytes([2 << 3 | 5]) + struct.pack("<f", score)
        return field(1, field(1, text.encode()) + scored + bytes([3 << 3, kind]))

    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -3.0, 1), ("ab", -1.0, 1)]
    content = b"".join(piece(*one) for one in pieces)
    (tmp_path / "spiece.model").write_bytes(content + field(3, bytes([3 << 3, 0, 4 << 3, 0])))
    model = read_sentencepiece(tmp_path / "spiece.model")
    assert [(text, kind) for text, _, kind in model.pieces] == [(text, kind) for text, _, kind in pieces]
    assert (model.adds_space, model.removes_spaces) == (False, False)
    tokenizer = T5Tokenizer(definition_of(model), {"eos_token": "</s>", "pad_token": "<pad>"})
    assert tokenizer.encode("ab ab") == [4, 3, 4, 1]
    assert tokenizer.decode([4, 3, 4, 1]) == "ab ab"

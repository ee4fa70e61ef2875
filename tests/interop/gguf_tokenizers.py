"""Tokenizers of SentencePiece's two kinds, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mtnlg.tokens import Tokenizer
from mtnlg.tokens.t5_tokenizer import T5Tokenizer

SENTENCES = ["the cat sat on the mat and the hat", "a rat ran at the cat, then sat there"] * 4
TEXTS = ["the cat", "that hat é 猫", "on the  mat ", "a rat, the hat and the mat"]


@cache
def merging_pieces() -> Tokenizer:
    """Pieces that merge, as Llama 2's: bytes where a letter has no piece, a space before the text."""
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    core.train_from_iterator(SENTENCES, trainer)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    definition = json.loads(core.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    return Tokenizer(json.dumps(definition), {"eos_token": "</s>", "bos_token": "<s>"})


@cache  # two trainings number alike pieces differently
def likely_pieces() -> T5Tokenizer:
    """The likeliest pieces, as T5's, with sentinels at the end of the vocabulary."""
    core = tokenizers.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    return T5Tokenizer(core.to_str(), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})

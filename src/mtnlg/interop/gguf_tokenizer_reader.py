"""A tokenizer out of a GGUF file's header: byte-level BPE, and SentencePiece's two kinds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from mtnlg.config import CheckpointError, DataError, MegatronModelConfig
from mtnlg.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SENTINEL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.sentencepiece_file import SPACE, SentencePieceModel
from mtnlg.tokens.sentencepiece_file import definition_of as definition_of_pieces
from mtnlg.tokens.t5_tokenizer import T5Tokenizer

_FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
# llama.cpp's other names of ways to cut that we have.
_ALIASES = {
    **dict.fromkeys(("mpt", "olmo", "jais"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "glm4"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), "qwen2"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
}
_WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a piece that is a token is not merged
_PREFIX = "tokenizer.ggml."


def tokenizer_of(fields: Mapping[str, Any], config: MegatronModelConfig, where: str) -> Tokenizer | None:
    """The tokenizer in a file's header; ``None`` where there is none, or (it warns) none of our kinds.

    Raises:
        CheckpointError: it is damaged.
    """
    kind = fields.get(f"{_PREFIX}model", "no_vocab")
    if kind == "no_vocab":
        return None
    try:
        definition = _definition(kind, fields)
        if definition is None:
            pre = fields.get(f"{_PREFIX}pre")
            warnings.warn(
                f"{where}: its tokenizer ({kind}, {pre}) is of no kind that can be read; put the model's "
                "tokenizer.json beside an import of it (mtnlg import --tokenizer).",
                stacklevel=2,
            )
            return None
        make = T5Tokenizer if config.has_encoder else Tokenizer
        return make(json.dumps(definition), settings_of(fields), where)
    except (KeyError, IndexError, TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{where}: its tokenizer is damaged: {error!r}.") from None


def _definition(kind: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a ``tokenizer.json``."""
    if kind == "t5":
        return _unigram(fields)
    if kind == "llama":
        return _sentencepiece_bpe(fields)
    name = str(fields.get(f"{_PREFIX}pre"))
    patterns = {name: pattern for pattern, name in PRE_TOKENIZERS.items()}
    pattern = patterns.get(_ALIASES.get(name, name))
    return None if kind != "gpt2" or pattern is None else _byte_level(fields, pattern)


def _added(fields: Mapping[str, Any], kinds: tuple[int, ...]) -> list[dict[str, Any]]:
    tokens, types = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}token_type"]
    return [
        {
            "id": index,
            "content": text,
            "special": kind != USER_DEFINED or text.startswith(SENTINEL),
            **_FLAGS,
        }
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in kinds
    ]


def _byte_level(fields: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    tokens, types = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}token_type"]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "ignore_merges": fields[f"{_PREFIX}pre"] in _WHOLE_PIECES,
        "vocab": {text: i for i, (text, kind) in enumerate(zip(tokens, types)) if kind != UNUSED},
        "merges": [merge.split(" ") for merge in fields[f"{_PREFIX}merges"]],
    }
    return _whole(
        model,
        _added(fields, (CONTROL, USER_DEFINED)),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
        decoder={**level, "use_regex": True},
    )


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Pieces that merge by score: every way to make a piece of two others becomes a merge."""
    tokens, types = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}token_type"]
    scores = fields[f"{_PREFIX}scores"]
    vocab = {text: index for index, text in enumerate(tokens) if types[index] != UNUSED}
    mergeable = {text: index for text, index in vocab.items() if types[index] in (NORMAL, USER_DEFINED)}
    found = []
    for text, index in mergeable.items():
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        ways = [way for way in ways if way[0] in mergeable and way[1] in mergeable]
        ways.sort(key=lambda way: (mergeable[way[0]], mergeable[way[1]]))
        found += [(-scores[index], way) for way in ways]
    found.sort(key=lambda item: item[0])
    unknown = next((text for text, kind in zip(tokens, types) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": BYTE in types,
        "vocab": vocab,
        "merges": [list(way) for _, way in found],
    }
    adds_space = fields.get(f"{_PREFIX}add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _whole(
        model,
        _added(fields, (UNKNOWN, CONTROL, USER_DEFINED)),
        normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
        decoder={"type": "Sequence", "decoders": steps},
    )


def _unigram(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens, types = fields[f"{_PREFIX}tokens"], fields[f"{_PREFIX}token_type"]
    model = SentencePieceModel(
        pieces=list(zip(tokens, fields[f"{_PREFIX}scores"], types, strict=True)),
        character_map=bytes(value & 255 for value in fields.get(f"{_PREFIX}precompiled_charsmap", ())),
        adds_space=fields.get(f"{_PREFIX}add_space_prefix", True),
        removes_spaces=fields.get(f"{_PREFIX}remove_extra_whitespaces", False),
    )
    end = fields.get(f"{_PREFIX}eos_token_id", 1)
    definition: dict[str, Any] = json.loads(definition_of_pieces(model, end=tokens[end]))
    return definition | {"added_tokens": _added(fields, (UNKNOWN, CONTROL, USER_DEFINED))}


def _whole(model: dict[str, Any], added: list[dict[str, Any]], **steps: Any) -> dict[str, Any]:
    none = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": added, **none, **steps, "model": model}


def settings_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``tokenizer_config.json`` for a file's header."""
    tokens = fields[f"{_PREFIX}tokens"]
    settings: dict[str, Any] = {}
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    for ours, theirs in names.items():
        index = fields.get(f"{_PREFIX}{theirs}_token_id")
        if index is not None and index < len(tokens):
            settings[ours] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    if fields.get(f"{_PREFIX}add_bos_token"):
        settings["add_bos_token"] = True
    return settings

"""SentencePiece models (``spiece.model``) as definitions of the ``tokenizers`` library.

The file is one Protocol Buffers message (sentencepiece_model.proto): field 1 holds the pieces, 2 how they
were trained, 3 how text is normalized. Only what encoding goes by is read, and nothing is executed.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtnlg.config.errors import DataError

FILE_NAME = "spiece.model"
SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # a piece's types
_UNIGRAM = 1
_NOT_ONE = "is no SentencePiece model, or it is damaged"


@dataclass
class SentencePieceModel:
    """What a ``spiece.model`` says.

    Args:
        pieces: (text, log-probability, type), in the order of their ids.
        kind: of the model; 1 is unigram.
        byte_fallback: letters without a piece are written as bytes.
        character_map: compiled rules of normalization; may be empty.
        adds_space: a space is put before the text.
        removes_spaces: spaces at both ends go, and several become one.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    character_map: bytes = b""
    adds_space: bool = True
    removes_spaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        DataError: it is no SentencePiece model, it is damaged, or it is of another kind than unigram.
    """
    model = SentencePieceModel()
    try:
        for number, value in _message(path.read_bytes()):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                trained = dict(_message(value))
                model.kind = trained.get(3, _UNIGRAM)
                model.byte_fallback = bool(trained.get(35, 0))
            elif number == 3:
                rules = dict(_message(value))
                model.character_map = rules.get(2, b"")
                model.adds_space = bool(rules.get(3, 1))
                model.removes_spaces = bool(rules.get(4, 1))
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"{path} {_NOT_ONE} ({error}).") from error
    if not model.pieces:
        raise DataError(f"{path} {_NOT_ONE}: it has no pieces.")
    if model.kind != _UNIGRAM:
        raise DataError(f"{path} is no unigram model, as T5's are: give a tokenizer.json instead.")
    return model


def _piece(message: bytes) -> tuple[str, float, int]:
    found = dict(_message(message))
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return found[1].decode("utf-8"), score, found.get(3, _NORMAL)


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a message: (number, whole number or bytes)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field of kind {kind}")
        if place + size > len(data):
            raise ValueError("it ends in the middle")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number has no end")


def definition_of(model: SentencePieceModel, extra_ids: int = 0, end: str = "</s>") -> str:
    """The same tokenizer as a ``tokenizer.json``.

    Args:
        model: what the file says.
        extra_ids: T5's sentinels that are not in the file: ``<extra_id_0>`` has the last id.
        end: put after every text where special tokens are asked for.
    """
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    pieces = [*model.pieces, *((name, 0.0, _USER_DEFINED) for name in sentinels)]
    names = [text for text, _, _ in pieces]
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    special = {_UNKNOWN, _CONTROL}
    added = [
        _added_token(index, text, kind in special or text in sentinels)
        for index, (text, _, kind) in enumerate(pieces)
        if kind in special or kind == _USER_DEFINED
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": _normalizer(model),
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": SPACE,
                "prepend_scheme": "always" if model.adds_space else "never",
                "split": False,
            },
            "post_processor": _end_after(end, names.index(end)) if end in names else None,
            "decoder": _decoder(model),
            "model": {
                "type": "Unigram",
                "unk_id": unknown,
                "vocab": [[text, score] for text, score, _ in pieces],
                "byte_fallback": model.byte_fallback,
            },
        },
        ensure_ascii=False,
    )


def _added_token(index: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": index, "content": text, **flags, "special": special}


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.character_map:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.character_map).decode()}
        )
    if model.removes_spaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _end_after(end: str, index: int) -> dict[str, Any]:
    text, token = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [text, token],
        "pair": [text, token, second, token],
        "special_tokens": {end: {"id": end, "ids": [index], "tokens": [end]}},
    }


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    if not model.byte_fallback:
        scheme = "always" if model.adds_space else "never"
        return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}

"""A tokenizer as GGUF holds it: tokens, their kinds and merges, and the name of how text is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtnlg.config import ConfigError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.split_pattern import GPT2_PATTERN, GPT4_PATTERN, QWEN2_PATTERN, split_pattern
from mtnlg.tokens.tokenizer import END_OF_TURN

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp has the cutting built in, under names; its "kimi-k2" is our pattern but for camelCase.
PRE_TOKENIZERS = {
    split_pattern(): "kimi-k2",
    GPT2_PATTERN: "gpt-2",
    GPT4_PATTERN: "llama-bpe",
    QWEN2_PATTERN: "qwen2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the tokenizer and its chat template into a file's header.

    Args:
        writer: of the file.
        tokenizer: the model's.
        vocab_size: rows of the model's embedding; ids that the tokenizer does not have become unused ones.

    Raises:
        ConfigError: llama.cpp cannot cut text as this tokenizer does, or it has more tokens than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: "
            "they do not belong together."
        )
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    if model.get("type") != "BPE":
        raise ConfigError(
            f"GGUF: the tokenizer is of the type {model.get('type')!r}: only BPE can be written."
        )
    tokens, types = _tokens(definition, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(model, merges, vocab_size))
        writer.add_add_space_prefix("Prepend" in json.dumps(definition.get("normalizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(definition))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_specials(writer, tokenizer)


def _tokens(definition: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts and kinds by id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    model = definition["model"]
    for text, index in model["vocab"].items():
        tokens[index], types[index] = text, _NORMAL
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = _BYTE
        elif text == model.get("unk_token"):
            types[index] = _UNKNOWN
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != _UNKNOWN:
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types


def _scores(model: dict[str, Any], merges: list[str], vocab_size: int) -> list[float]:
    """SentencePiece's way to say which merge comes first: the higher score."""
    scores = [0.0] * vocab_size
    for rank, merge in reversed(list(enumerate(merges))):  # the first that makes a token counts
        scores[model["vocab"][merge.replace(" ", "")]] = -float(rank + 1)
    return scores


def _pre_tokenizer(definition: dict[str, Any]) -> str:
    """llama.cpp's name of how text is cut."""
    cutting = definition.get("pre_tokenizer") or {}
    steps = cutting.get("pretokenizers", [cutting])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if not patterns and any(step.get("type") == "ByteLevel" and step.get("use_regex") for step in steps):
        patterns = [GPT2_PATTERN]
    if len(patterns) != 1 or patterns[0] not in PRE_TOKENIZERS:
        raise ConfigError(
            "GGUF: llama.cpp has no name for how this tokenizer cuts text; only those of mtnlg, GPT-2, "
            "Llama 3 and Qwen 2 can be written (in tokenizer.json: pre_tokenizer)."
        )
    return PRE_TOKENIZERS[patterns[0]]


def definition_of(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a ``tokenizer.json`` for a file's header; ``None`` where we have none of its kind."""
    patterns = {name: pattern for pattern, name in PRE_TOKENIZERS.items()}
    pre = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in patterns:
        return None
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [
        {"id": index, "content": text, "special": kind == _CONTROL, **flags}
        for index, (text, kind) in enumerate(zip(tokens, types))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    split = {"type": "Split", "pattern": {"Regex": patterns[pre]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "ignore_merges": pre == "llama-bpe",
        "vocab": {text: i for i, (text, kind) in enumerate(zip(tokens, types)) if kind != _UNUSED},
        "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": model,
    }


def settings_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``tokenizer_config.json`` for a file's header."""
    tokens = fields["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {}
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            settings[ours] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    if fields.get("tokenizer.ggml.add_bos_token"):
        settings["add_bos_token"] = True
    return settings


def _add_specials(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    begin = tokenizer.core.token_to_id(tokenizer.special_names.get("bos_token", ""))
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_pad_token_id(tokenizer.padding_id)
    if END_OF_TURN in tokenizer.special_tokens:
        writer.add_eot_token_id(tokenizer.special_tokens[END_OF_TURN])
    writer.add_add_bos_token(bool(tokenizer.settings.get("add_bos_token", False)))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)

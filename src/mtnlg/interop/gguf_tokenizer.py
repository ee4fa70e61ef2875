"""A tokenizer as GGUF holds it: tokens, their kinds and merges, and the name of how text is cut."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from mtnlg.config import ConfigError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.split_pattern import (
    BLOOM_PATTERN,
    GPT2_PATTERN,
    GPT4_PATTERN,
    QWEN2_PATTERN,
    split_pattern,
)
from mtnlg.tokens.t5_tokenizer import T5Tokenizer
from mtnlg.tokens.tokenizer import END_OF_TURN

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp has the cutting built in, under names; its "kimi-k2" is our pattern but for camelCase.
PRE_TOKENIZERS = {
    split_pattern(): "kimi-k2",
    GPT2_PATTERN: "gpt-2",
    GPT4_PATTERN: "llama-bpe",
    QWEN2_PATTERN: "qwen2",
    BLOOM_PATTERN: "bloom",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SENTINEL = "<extra_id_"
_UNLIKELY = -10000.0  # score of ids without a token


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
    if model.get("type") == "Unigram":
        _add_unigram(writer, definition, vocab_size)
        _add_specials(writer, tokenizer)
        writer.add_add_eos_token(isinstance(tokenizer, T5Tokenizer))
        return
    if model.get("type") != "BPE":
        raise ConfigError(
            f"GGUF: the tokenizer is of the type {model.get('type')!r}: "
            "only BPE and Unigram can be written."
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


def _add_unigram(writer: GGUFWriter, definition: dict[str, Any], vocab_size: int) -> None:
    """SentencePiece's pieces with their log-probabilities, as T5 has them."""
    model = definition["model"]
    pieces = dict(enumerate(model["vocab"]))
    tokens, types = _tokens(definition, vocab_size, {text: index for index, (text, _) in pieces.items()})
    if model.get("unk_id") is not None:
        types[model["unk_id"]] = UNKNOWN
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [USER_DEFINED if text.startswith(SENTINEL) else kind for text, kind in zip(tokens, types)]
    )
    writer.add_token_scores([pieces[i][1] if i in pieces else _UNLIKELY for i in range(vocab_size)])
    steps = _steps(definition, "normalizer", "normalizers") + _steps(
        definition, "pre_tokenizer", "pretokenizers"
    )
    space = next((step for step in steps if step["type"] == "Metaspace"), {})
    writer.add_add_space_prefix(space.get("prepend_scheme", "always") != "never")
    removes = any(step["type"] in ("WhitespaceSplit", "Strip") for step in steps)
    writer.add_remove_extra_whitespaces(removes)
    maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    if maps:
        writer.add_precompiled_charsmap(base64.b64decode(maps[0]))


def _steps(definition: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    whole = definition.get(name)
    return [] if whole is None else whole.get(inner, [whole])


def _tokens(
    definition: dict[str, Any], vocab_size: int, vocab: dict[str, int] | None = None
) -> tuple[list[str], list[int]]:
    """Token texts and kinds by id."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    model = definition["model"]
    for text, index in (model["vocab"] if vocab is None else vocab).items():
        tokens[index], types[index] = text, NORMAL
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = BYTE
        elif text == model.get("unk_token"):
            types[index] = UNKNOWN
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _scores(model: dict[str, Any], merges: list[str], vocab_size: int) -> list[float]:
    """SentencePiece's way to say which merge comes first: the higher score."""
    scores = [0.0] * vocab_size
    for rank, merge in reversed(list(enumerate(merges))):  # the first that makes a token counts
        scores[model["vocab"][merge.replace(" ", "")]] = -float(rank + 1)
    return scores


def _pre_tokenizer(definition: dict[str, Any]) -> str:
    """llama.cpp's name of how text is cut."""
    steps = _steps(definition, "pre_tokenizer", "pretokenizers")
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if not patterns and any(step.get("type") == "ByteLevel" and step.get("use_regex") for step in steps):
        patterns = [GPT2_PATTERN]
    if len(patterns) != 1 or patterns[0] not in PRE_TOKENIZERS:
        raise ConfigError(
            "GGUF: llama.cpp has no name for how this tokenizer cuts text; only those of mtnlg, GPT-2, "
            "Llama 3, Qwen 2 and BLOOM can be written (in tokenizer.json: pre_tokenizer)."
        )
    return PRE_TOKENIZERS[patterns[0]]


def _add_specials(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    begin = tokenizer.core.token_to_id(tokenizer.special_names.get("bos_token", ""))
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end if begin is None else begin)
    writer.add_pad_token_id(tokenizer.padding_id)
    if END_OF_TURN in tokenizer.special_tokens:
        writer.add_eot_token_id(tokenizer.special_tokens[END_OF_TURN])
    unknown = tokenizer.core.token_to_id(tokenizer.special_names.get("unk_token", ""))
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(bool(tokenizer.settings.get("add_bos_token", False)))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)

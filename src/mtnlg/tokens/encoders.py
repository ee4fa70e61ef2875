"""The engines that turn text into ids in bulk: the fastest one that agrees with ``tokenizers``.

``tokenizers`` follows every token's place in the text and encodes at about 2 MB/s on one core. Engines
that give up the places are ten times as fast (measured in ``benchmarks/results/encode.md``). None is
trusted blindly: an engine is used only after it gave the same ids as ``tokenizers`` on probes made to
trip it up, and ``CheckedEncoder`` goes on comparing samples of the real input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens.tokenizer import Tokenizer

ENGINES = ("splintr", "tiktoken", "tokenizers")  # fastest first
_CHECKED_CHARACTERS = 1024

PROBES = [
    "",
    " ",
    "  \n\n \t x\r\n\r\n  y",
    "The quick brown fox don't jump; it'll 'quote' 12345678.90!  ",
    "def f(self, x_1=None):\n    return self.x[0] + 'a' # 注释\n\n\n\tpass\n",
    "秋天的夜晚，星光闪烁，一群人在山上唱歌跳舞直到天亮。\n「春眠不覺曉」……〇々〆",
    "GPT-3有1750亿个参数，約175B；見https://example.org/a?b=c&d=%20。",
    "ひらがなカタカナ漢字　한국어 ไทย العربية עברית हिन्दी Ελληνικά Русский",
    "e\u0301 a\u0308\u0323 \u200b\u200d\ufeff 👩‍👩‍👧‍👦🇨🇳🏳️‍🌈 𝔘𝔫𝔦 𠀀𪚥 ½ Ⅷ ² \u2028\u2029\x85\xa0\u3000",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\ufffd\U0010ffff\ue000",
    "<|endoftext|> <|user|><|end|> [INST] <s></s> <|im_start|>",
    "a" * 300 + "啊" * 300 + "1" * 300 + "!" * 300 + " " * 300 + "\n" * 300,
    "ÀÉÎõü ŒœÆæ ßẞ ſİı ǅǈ ﬁﬂ ＦＵＬＬ　ｗｉｄｔｈ",
]


class Encoder(Protocol):
    """Encodes many texts at once."""

    name: str

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Ids of all texts end to end, ``[tokens]``, and how many each has, ``[texts]``."""


class _CoreEncoder:
    """``tokenizers`` itself: slow, and right by definition."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return _joined(self._tokenizer.encode_batch(texts))


class _SplintrEncoder:
    """splintr-rs: compiled split pattern, merging with a cache of bounded size."""

    name = "splintr"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import splintr

        definition = json.loads(tokenizer.definition)
        definition["added_tokens"] = []  # their names are ordinary text in documents
        definition["post_processor"] = None
        definition["truncation"] = definition["padding"] = None
        self._engine = splintr.from_json_bytes(json.dumps(definition).encode("utf-8"))

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        ids, bounds = self._engine.encode_batch_flat(texts)
        edges = np.frombuffer(bounds, np.uint64 if len(bounds) == 8 * (len(texts) + 1) else np.uint32)
        return np.frombuffer(ids, np.uint32), np.diff(edges.astype(np.int64))


class _TiktokenEncoder:
    """tiktoken, given the ranks and the split pattern of our ``tokenizer.json``."""

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import tiktoken

        definition = json.loads(tokenizer.definition)
        added = {entry["content"] for entry in definition["added_tokens"]}
        letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        vocabulary = definition["model"]["vocab"]
        ranks = {bytes(letters[c] for c in name): i for name, i in vocabulary.items() if name not in added}
        self._engine = tiktoken.Encoding(
            "mtnlg", pat_str=_split_regex(definition), mergeable_ranks=ranks, special_tokens={}
        )

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return _joined([self._engine.encode_to_numpy(text, disallowed_special=()) for text in texts])


_MAKERS: dict[str, Callable[[Tokenizer], Encoder]] = {
    "splintr": _SplintrEncoder,
    "tiktoken": _TiktokenEncoder,
    "tokenizers": _CoreEncoder,
}


class CheckedEncoder:
    """An engine whose work is compared with ``tokenizers`` now and then.

    Args:
        tokenizer: decides what is right.
        engine: one of ``ENGINES``, or ``"auto"`` for the fastest that is installed and agrees.

    Raises:
        ConfigError: the engine asked for is unknown, not installed, or gives other ids.
    """

    def __init__(self, tokenizer: Tokenizer, engine: str = "auto") -> None:
        self._reference = _CoreEncoder(tokenizer)
        self._engine = _choose(tokenizer, engine)
        self.name = self._engine.name

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """As ``Encoder``; a disagreement on the sample raises ``DataError`` before anything is kept."""
        ids, lengths = self._engine(texts)
        if self.name != "tokenizers" and len(texts):
            self._compare(texts, ids, lengths)
        return ids, lengths

    def _compare(self, texts: Sequence[str], ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        # The sampled text differs from call to call, and is a short one where there is a choice.
        index = (len(ids) * 7919) % len(texts)
        if len(texts[index]) > _CHECKED_CHARACTERS:
            sample = texts[index][:_CHECKED_CHARACTERS]
            got, _ = self._engine([sample])
        else:
            start = int(lengths[:index].sum())
            sample, got = texts[index], ids[start : start + int(lengths[index])]
        expected, _ = self._reference([sample])
        if not np.array_equal(got, expected):
            raise DataError(
                f"the encoder {self.name} disagrees with tokenizers on {sample[:80]!r}: "
                "run again with --engine tokenizers, and please report this text."
            )


def agrees(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str] = tuple(PROBES)) -> bool:
    """Whether ``encoder`` gives the ids of ``tokenizers`` for every text."""
    ids, lengths = encoder(texts)
    expected, expected_lengths = _CoreEncoder(tokenizer)(texts)
    return np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected)


def _choose(tokenizer: Tokenizer, engine: str) -> Encoder:
    if engine != "auto" and engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}: choose auto or one of {', '.join(ENGINES)}.")
    for name in ENGINES if engine == "auto" else (engine,):
        try:
            candidate = _MAKERS[name](tokenizer)
            if agrees(candidate, tokenizer):
                return candidate
            problem = "gives other ids than tokenizers for this tokenizer"
        except ImportError:
            problem = "is not installed"
        except Exception as error:  # an engine that cannot read this kind of tokenizer
            problem = f"cannot read this tokenizer: {error}"
        if engine != "auto":
            raise ConfigError(f"the encoder {name} {problem}: use --engine auto.")
    raise DataError("no encoder agrees with this tokenizer")


def _joined(rows: Sequence[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    parts = [np.asarray(row, dtype=np.uint32) for row in rows]
    return (np.concatenate(parts) if parts else np.empty(0, np.uint32)), lengths


def _split_regex(definition: dict[str, Any]) -> str:
    """The one regular expression that cuts the text, where that is all the pre-tokenizer does."""
    from mtnlg.tokens.split_pattern import GPT2_PATTERN

    steps = definition["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    patterns += [GPT2_PATTERN for step in steps if step["type"] == "ByteLevel" and step["use_regex"]]
    plain = all(not step.get("add_prefix_space") and not step.get("invert") for step in steps)
    if definition["normalizer"] or len(patterns) != 1 or not plain:
        raise ValueError("it does more than split by one pattern")
    return patterns[0]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]

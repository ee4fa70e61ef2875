"""Permutations that are a function of their seed alone, on every machine and numpy version.

Each item gets a 64-bit key, SplitMix64's output for its number (Steele, Lea and Flood 2014), and the
items are sorted by key. SplitMix64 is a bijection, so no two keys are equal and the order does not
depend on the sorting algorithm.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def seed_of(*parts: Any) -> int:
    """A 64-bit seed from plain values (numbers, strings, lists, dicts)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(count: int, seed: int) -> np.ndarray:
    """The numbers 0..count-1 in the order of ``seed``: int32 [count], int64 from 2**31 on."""
    return np.argsort(_keys(count, seed)).astype(np.int32 if count < 2**31 else np.int64)


def uniform(count: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count]: the upper 53 bits of each key."""
    return (_keys(count, seed) >> np.uint64(11)) * 2.0**-53


def _keys(count: int, seed: int) -> np.ndarray:
    keys = np.arange(1, count + 1, dtype=np.uint64)
    keys *= _GAMMA
    keys += np.uint64(seed)
    keys ^= keys >> np.uint64(30)
    keys *= _MIX_1
    keys ^= keys >> np.uint64(27)
    keys *= _MIX_2
    keys ^= keys >> np.uint64(31)
    return keys

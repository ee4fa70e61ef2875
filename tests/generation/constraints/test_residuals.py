"""Masks of regular expressions that are known again are the masks that llguidance makes."""

import random

import numpy as np
import pytest
import torch
from tests.generation.constraints.models import SPARE_IDS, make_tokenizer

from mtnlg.generation.constraints import constraint_from_options
from mtnlg.generation.constraints.residuals import Residual


def mask_of(fill, num_words):
    words = torch.zeros(num_words, dtype=torch.int32)
    fill(words)
    return words


@pytest.mark.parametrize(
    "expression",
    [
        "([一-龥a-z ]{5}[，。\\n]){200}",
        "(春|夏|秋|冬)天.{2}[。！]",
        "(a|ab)(c|bcd)*d?",
        "([^a\\n]{2,}x?){3}|.{30,40}",
        "(?:é+|[春-秋]{1,3}(ab?)*){2,}\\.",
        "((a{0,2}b?){30,40}(中国|.*)){2}",
    ],
)
def test_masks_known_again_are_those_made_anew(tokenizer, expression):
    vocab_size = tokenizer.vocab_size + SPARE_IDS
    rule = constraint_from_options(tokenizer, vocab_size, "regex", expression)
    assert rule._residual is not None
    chance, filled = random.Random(1), 0
    for _ in range(6):
        state = rule.start()
        for _ in range(20):
            filled += 1
            mask = mask_of(state.fill_mask, -(-vocab_size // 32))
            assert torch.equal(mask, mask_of(state.copy()._make_mask, len(mask)))
            allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little"))
            state.accept(int(chance.choice(allowed)))
            if state.is_complete:
                break
    assert len(rule._shared.masks._values) < filled


def seen(expression, text, most_characters=3):
    return Residual.of(expression, most_characters).after(text.encode()).key


def test_what_is_the_same_and_what_is_not():
    assert seen("(ab){9}", "ab") == seen("(ab){9}", "abab") != seen("(ab){9}", "aba")
    assert seen("(ab){9}", "ab" * 7) != seen("(ab){9}", "ab" * 8)  # the end is within a token's reach
    assert seen("a*b", "") == seen("a*b", "aaa")
    assert seen("春|夏", "春") == seen("春|夏", "夏")
    half = Residual.of("(春|冬)+", 3).after("春".encode()[:2])
    assert half.key != Residual.of("(春|冬)+", 3).key and half.after("春".encode()[2:]).key == seen(
        "(春|冬)+", "冬"
    )
    assert Residual.of("ab", 3).after(b"x") is None  # llguidance would not have allowed it


@pytest.mark.parametrize(
    "expression",
    [
        "(?i)a",
        r"\p{Han}",
        r"\d",
        "^a",
        "a$",
        "[[:alpha:]]",
        "[a&&b]",
        "[a--b]",
        "a*?",
        "a{,3}",
        "(",
        "a)",
        "(|b{9})**",
    ],
)
def test_what_is_not_read_is_not_remembered(expression):
    assert Residual.of(expression, 3) is None


def test_too_many_derivatives_are_not_followed():
    found = Residual.of("(a|b)*a(a|b){20}", 30)
    chance = random.Random(1)
    for _ in range(20_000):
        found = found.after(chance.choice([b"a", b"b"]))
        if found is None:
            break
    assert found is None


def test_a_rule_that_is_not_read_still_guides():
    tokenizer = make_tokenizer()
    rule = constraint_from_options(tokenizer, tokenizer.vocab_size, "regex", r"\d{2}")
    assert rule._residual is None
    state = rule.start()
    state.accept(tokenizer.encode("1")[0])
    assert not state.is_complete

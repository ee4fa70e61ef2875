import random
from functools import cache

import numpy as np
import pytest
import torch
from tests.generation.constraints.models import SPARE_IDS, generate, make_engine, make_tokenizer
from tests.generation.constraints.verse_checker import (
    is_good_line,
    is_regulated,
    readings,
    rhyme_sets,
    share_a_rhyme,
    split_lines,
    tones,
)

from mtnlg.config import ConfigError
from mtnlg.config.errors import MtnlgError
from mtnlg.generation.constraints import constraint_from_options
from mtnlg.generation.constraints.verse import VerseForm, verse_constraint
from mtnlg.generation.constraints.verse.rhymes import alphabet, rhyme_book
from mtnlg.generation.constraints.verse.tokens import letter_length, token_bytes

REGULATED = {"wujue": (4, 5), "qijue": (4, 7), "wulv": (8, 5), "qilv": (8, 7)}


def compile_verse(tokenizer, value):
    return constraint_from_options(tokenizer, tokenizer.vocab_size + SPARE_IDS, "verse", value)


def allowed_tokens(state, tokenizer):
    words = torch.zeros(-(-(tokenizer.vocab_size + SPARE_IDS) // 32), dtype=torch.int32)
    state.fill_mask(words)
    return set(np.flatnonzero(np.unpackbits(words.numpy().view(np.uint8), bitorder="little")).tolist())


def write(tokenizer, value, text):
    """The state after a text; an error if the form does not allow it."""
    state = compile_verse(tokenizer, value).start()
    for token in tokenizer.encode(text):
        assert token in allowed_tokens(state, tokenizer), tokenizer.decode([token])
        state.accept(token)
    return state


# -- nothing that a model says can break the form


def test_poems_of_a_model_that_knows_nothing_scan(tokenizer):
    engine = make_engine(tokenizer)
    forms = [(name, book) for name in REGULATED for book in ("pingshui", "xinyun", "shisanzhe")]
    found = generate(engine, [compile_verse(tokenizer, f"{name}:{book}") for name, book in forms])
    for (name, book), generation in zip(forms, found):
        count, length = REGULATED[name]
        lines, marks = split_lines(generation.text)
        assert generation.finish_reason == "stop", generation.error
        assert [len(line) for line in lines] == [length] * count
        assert [mark[0] in "，；？！" for mark in marks[::2]] == [True] * (count // 2)
        assert [mark[0] in "。；？！" for mark in marks[1::2]] == [True] * (count // 2)
        if book == "shisanzhe":  # the modern tones; its rhymes are unions of the fourteen
            assert {tuple(tones(line[-1], "modern")) for line in lines[1::2]} - {("Z",)}
        else:
            table = "pingshui" if book == "pingshui" else "modern"
            assert is_regulated(lines, table), generation.text


def test_free_lines_and_their_rhyme(tokenizer):
    engine = make_engine(tokenizer)
    values = ["5,7,5", "7,7,7,7:rhyme=1,2,4:bare", {"lines": [3, 3, 7], "book": "xinyun", "rhyme": [2, 3]}]
    haiku, song, verse = (
        split_lines(generation.text)
        for generation in generate(engine, [compile_verse(tokenizer, value) for value in values])
    )
    assert [len(line) for line in haiku[0]] == [5, 7, 5] and len(haiku[1]) == 3
    assert [len(line) for line in song[0]] == [7] * 4 and song[1] == ["\n"] * 3
    assert share_a_rhyme([song[0][i][-1] for i in (0, 1, 3)], "pingshui")
    ends = [{rhyme for _, rhyme in readings("modern")[line[-1]]} for line in verse[0][1:]]
    assert [len(line) for line in verse[0]] == [3, 3, 7] and ends[0] & ends[1]


def test_strict_tones_and_given_first_letters(tokenizer):
    engine = make_engine(tokenizer)
    strict, heads = generate(
        engine,
        [compile_verse(tokenizer, "wujue:strict"), compile_verse(tokenizer, "qijue:heads=春夏秋冬")],
    )
    lines, _ = split_lines(strict.text)
    for line in lines:
        patterns = ("PPPZZ", "ZZZPP", "ZZPPZ", "PPZZP")
        assert any(all(t in tones(c, "pingshui") for t, c in zip(p, line)) for p in patterns), line
    lines, _ = split_lines(heads.text)
    assert "".join(line[0] for line in lines) == "春夏秋冬" and is_regulated(lines)


def test_a_poem_that_the_prompt_began_is_brought_to_its_end(tokenizer):
    begin = "白日依山尽，黄河入海流。\n"
    rule = compile_verse(tokenizer, {"form": "wujue", "begin": begin})
    (found,) = generate(make_engine(tokenizer), [rule])
    lines, _ = split_lines(begin + found.text)
    assert len(lines) == 4 and is_regulated(lines)


def test_a_poem_cut_short_says_so(tokenizer):
    (found,) = generate(make_engine(tokenizer), [compile_verse(tokenizer, "qilv")], max_new_tokens=5)
    assert found.finish_reason == "length" and len(found.new_ids) == 5


# -- the mask, token by token


@cache
def letters_that_begin_with(part):
    return [i for i, letter in enumerate(alphabet().letters) if letter.encode().startswith(part)]


def may_take(constraint, state, token, content):
    """Whether the bytes of a token fit, by trying letter by letter."""
    rules = constraint.rules
    place, rest = state._place, state._pending + content
    while rest:
        length = letter_length(rest[0])
        if not length:
            return False
        if len(rest) < length:
            return any(rules.step(place, letter) for letter in letters_that_begin_with(rest))
        letter = alphabet().number.get(rest[:length].decode("utf-8", "replace"), -1)
        place = rules.step(place, letter)
        if place is None:
            return False
        rest = rest[length:]
    return True


@pytest.mark.parametrize(
    "value",
    ["wujue", "qijue:xinyun:heads=山高水长", "3,3:rhyme=1,2:bare", "qilv", "1,2,1,1:rhyme=1,2,3,4:xinyun"],
)
def test_the_mask_is_what_trying_each_token_says(tokenizer, value):
    constraint = compile_verse(tokenizer, value)
    contents = token_bytes(tokenizer.definition)
    chance = random.Random(1)
    for _ in range(2):
        state = constraint.start()
        while not state.is_complete:
            allowed = allowed_tokens(state, tokenizer)
            for token in chance.sample(sorted(contents), 60) + chance.sample(sorted(allowed), 1):
                assert may_take(constraint, state, token, contents[token]) == (token in allowed)
            assert max(allowed) < tokenizer.vocab_size
            # tokens that hold many or broken letters more often than they would come
            weights = [
                len(contents[token]) + 5 * (len(contents[token]) % 3 > 0) for token in sorted(allowed)
            ]
            state.accept(chance.choices(sorted(allowed), weights)[0])
        assert allowed_tokens(state, tokenizer) == set(constraint.end_ids)


def test_a_letter_cut_short_is_no_letter():
    from mtnlg.generation.constraints.verse.tokens import _piece

    assert _piece(b"\xe9\x9f\n") is None and _piece("山\n".encode()) is not None


def test_a_copy_goes_its_own_way():
    tokenizer = make_tokenizer()
    state = write(tokenizer, "wujue", "白日依山尽")
    copy = state.copy()
    copy.accept(tokenizer.encode("，")[0])
    assert allowed_tokens(state, tokenizer) != allowed_tokens(copy, tokenizer)
    with pytest.raises(MtnlgError, match="does not fit"):
        state.accept(tokenizer.encode("a")[0])


# -- poems of the Tang

POEMS = {
    "wujue": "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "qijue": "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。",
    "wulv": "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。"
    "烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。",
    "qilv": "風急天高猿嘯哀，渚清沙白鳥飛迴。無邊落木蕭蕭下，不盡長江滾滾來。"
    "萬里悲秋常作客，百年多病獨登臺。艱難苦恨繁霜鬢，潦倒新停濁酒杯。",
}


@pytest.mark.parametrize("form", POEMS)
def test_poems_of_the_tang_are_allowed(tokenizer, form):
    assert is_regulated(split_lines(POEMS[form])[0])
    assert write(tokenizer, form, POEMS[form]).is_complete
    assert write(
        tokenizer, form, POEMS[form].replace("，", "，\n").replace("。", "。\n").strip()
    ).is_complete


def test_an_old_style_poem_is_not_regulated():
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    with pytest.raises(ConfigError, match=r"疑是地\[上\]霜"):
        VerseForm.from_value({"form": "wujue", "begin": poem})
        verse_constraint(make_tokenizer(), 1500, {"form": "wujue", "begin": poem})
    assert write(make_tokenizer(), "5,5,5,5:rhyme=1,2,4", poem).is_complete


def test_the_books_differ_as_they_should():
    number = alphabet().number
    old, new = rhyme_book("pingshui"), rhyme_book("xinyun")
    assert old.tones[number["一"]] == 2 and new.tones[number["一"]] == 1  # an entering tone of old
    assert old.tones[number["看"]] == 3
    assert (
        rhyme_sets("东冬", "pingshui") == [{"東"}, {"冬"}] and rhyme_sets("東冬", "modern") == [{"庚"}] * 2
    )
    assert len(old.names) == 30 and len(new.names) == 14 and len(rhyme_book("shisanzhe").names) == 13
    for letter in "春江潮水连海平天涯共此时灯碗溪糖这你她":
        assert old.tones[number[letter]] and new.tones[number[letter]], letter


def test_the_checker_sees_broken_poems():
    lines = split_lines(POEMS["wujue"])[0]
    assert not is_regulated([*lines[:3], lines[1]])  # rhymes with itself
    assert not is_regulated([*lines[:3], "更上一层山"])
    assert not is_regulated([lines[0], lines[2], lines[1], lines[3]])
    assert is_good_line("欲穷千里目", "PZ", "pingshui") and not is_good_line("欲穷千里山", "PZ", "pingshui")


# -- what users may get wrong


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sonnet", "choose one of wujue, qijue, wulv, qilv"),
        ("5,x", "give numbers with commas"),
        ("5,0", "each has 1 to 32"),
        ("wujue:loud", "choose one of relaxed, strict, free, pingshui"),
        ("wujue:book=songyun", "choose one of pingshui, xinyun, shisanzhe"),
        ("5,5:rhyme=3", "the lines are 1 to 2"),
        ("wujue:heads=春夏", "it needs 4 characters"),
        ("wujue:heads=abcd", "is no Chinese character"),
        ("wujue:strict:heads=山山山山", "no tone pattern of the form"),
        ({"form": "wujue", "color": "red"}, "verse has no color"),
        ({"form": "wujue", "begin": "白日依山尽。"}, r"白日依山尽\[。\]"),
        ({"form": "wujue", "begin": POEMS["wujue"]}, "whole poem already"),
        (7, "give a form such as"),
        ("", "choose one of wujue"),
    ],
)
def test_forms_that_cannot_be(value, message):
    with pytest.raises(ConfigError, match=message):
        compile_verse(make_tokenizer(), value)


def test_a_tokenizer_without_chinese_is_refused():
    from mtnlg.tokens import Tokenizer

    definition = (
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,'
        ' "pre_tokenizer": null, "post_processor": null, "decoder": null,'
        ' "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "山": 2}, "unk_token": "a"}}'
    )
    with pytest.raises(ConfigError, match="too few Chinese characters"):
        constraint_from_options(Tokenizer(definition), 3, "verse", "wujue", end_ids=[0])


def test_the_same_form_is_compiled_once():
    tokenizer = make_tokenizer()
    assert compile_verse(tokenizer, "七绝") is compile_verse(tokenizer, {"form": "qijue"})

"""Small texts and a small tokenizer that the tests of this folder share."""

from __future__ import annotations

from functools import cache

from mtnlg.tokens import Tokenizer

VERSE = "春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n"
PROSE = "秋天的夜晚，星光闪烁，一群人在山上唱歌。他们说：“今年的收成很好！”\n"
ENGLISH = "The quick brown fox doesn't jump over 12345 lazy dogs; it sleeps.\n"
CODE = "def area(self, width_1=None):\n    return self.width * 3.14  # 面积\n\n\n\tpass\n"
TEXTS = [VERSE, PROSE, ENGLISH, CODE] * 8


@cache
def small_tokenizer() -> Tokenizer:
    """About 400 tokens, trained on ``TEXTS``."""
    return Tokenizer.train(TEXTS, 400)

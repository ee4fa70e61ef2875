"""A tiny model that answers without end, and a terminal to talk with it."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time

import torch

from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer

TEXTS = ["User: hello there\nAssistant: hi, how are you?\n", "用户：你好\n助手：早上好！🦊\n"] * 10
PROMPT_IS_READY = "\x1b[?2004h"  # the line editor turns bracketed paste on
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][A-Z0-9]?|\x1b\][^\x07]*\x07|\r|.\x08")


def save_model(folder, template=None, positions=4096):
    """A folder of a model with random weights which never ends a text by itself."""
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.chat_template = template
    config = MegatronModelConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        init_method_std=0.4,
    )
    model = MegatronLmModel(config, tokenizer, seed=5)
    with torch.no_grad():  # no special token, nothing that is not a letter, is ever the likeliest
        for token in range(300):
            if not tokenizer.decode([token]).strip().isascii() or token < 8:
                model.embedding.tokens.weight[token] = 0
    model.save_pretrained(folder)
    return folder


def without_codes(text):
    """The text without what moves the cursor, and where each character of it stood."""
    codes = {place for found in CODES.finditer(text) for place in range(*found.span())}
    places = [place for place in range(len(text)) if place not in codes]
    return "".join(text[place] for place in places), places


class Terminal:
    """``mtnlg`` in a pseudo-terminal."""

    def __init__(self, *words, **environment):
        self.seen = ""
        self._place = 0
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.environ.update({"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment})
            termios.tcsetwinsize(0, (40, 200))
            os.environ.pop("COLUMNS", None)
            os.environ["OMP_NUM_THREADS"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "mtnlg", *words])

    def send(self, text):
        """Type."""
        os.write(self._file, text.encode())

    def expect(self, pattern, raw=False, seconds=60):
        """Wait until ``pattern`` appears after what was expected before; gives all the text up to there."""
        end = time.monotonic() + seconds
        while True:
            rest = self.seen[self._place :]
            text, places = (rest, range(len(rest))) if raw else without_codes(rest)
            found = re.search(pattern, text)
            if found:
                self._place += places[found.end() - 1] + 1
                return text[: found.end()]
            assert time.monotonic() < end, f"{pattern!r} did not appear in {text!r}"
            self._read()

    def expect_prompt(self):
        """Wait for the line editor."""
        return without_codes(self.expect(re.escape(PROMPT_IS_READY), raw=True))[0]

    def wait(self):
        """The exit code, once the program has ended."""
        while True:
            try:
                self._read()
            except OSError:  # the other side is closed
                break
        _, status = os.waitpid(self._pid, 0)
        os.close(self._file)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self):
        """End the program if it still runs."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.wait()

    def _read(self):
        ready, _, _ = select.select([self._file], [], [], 1.0)
        if ready:
            data = os.read(self._file, 65536)
            if not data:
                raise OSError("closed")
            self.seen += data.decode("utf-8", errors="replace")


class Notebook:
    """A screen that writes down what it is shown."""

    def __init__(self):
        self.lines, self.answers = [], []

    def note(self, text):
        self.lines.append(text)

    def error(self, text):
        self.lines.append(f"error: {text}")

    def table(self, rows):
        self.lines += [" ".join(row) for row in rows]

    def message(self, name, text):
        self.lines.append(f"{name}{text}")

    def begin_answer(self, name):
        self.answers.append("")

    def piece(self, text):
        self.answers[-1] += text

    def end_answer(self, remark=""):
        self.lines.append(remark)


def make_session(folder):
    """A chat with the model in ``folder``, shown in a :class:`Notebook`."""
    from mtnlg.cli.chat_session import ChatSession
    from mtnlg.generation import Engine, SamplingRules
    from mtnlg.generation.dialogue import Dialogue, DialogueOptions
    from mtnlg.generation.dialogue_format import choose_format

    model = MegatronLmModel.from_pretrained(folder)
    engine = Engine(model, model.tokenizer.decode)
    options = DialogueOptions(SamplingRules(1.0, seed=1), max_new_tokens=6)
    form = choose_format(model.tokenizer)
    dialogue = Dialogue(engine, model.tokenizer, form, options=options)
    return ChatSession(dialogue, model.tokenizer, Notebook())

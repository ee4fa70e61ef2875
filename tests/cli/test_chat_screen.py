"""What a chat reads and shows: keys, bytes, control characters, colours, widths."""

from __future__ import annotations

import io
import os
import pty
import re
import termios

import pytest
from tests.cli.chat_models import make_session, save_model

from mtnlg.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def session(folder):
    return make_session(folder)


def test_what_a_model_writes_cannot_command_the_terminal(capsys):
    from mtnlg.cli.chat_screen import Screen, visible

    Screen().piece("a\x1b[2Jb\x07\r\n\t你👩\u200d👧\x9b\u202e")
    assert capsys.readouterr().out == "a␛[2Jb␇␍\n\t你👩\u200d👧\ufffd\ufffd"
    assert visible("\x7f") == "␡"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_unless_they_are_not_wanted(monkeypatch, capsys, no_color):
    from mtnlg.cli.chat_screen import RichScreen

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    screen = RichScreen()
    screen.begin_answer("Model:")
    screen.error("[bold]x")
    screen.table([("[a]", "b")])
    out = capsys.readouterr().out
    assert "[bold]x" in out
    assert "[a]" in out
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", out)) is not bool(no_color)


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("hello\r", "hello"),
        ("a\x1b\rb\r", "a\nb"),
        ("a\n", "a"),  # typed while an answer came
        ("a\\\rb\r", "a\nb"),
        ("\x1b[200~a\nb\n\x1b[201~\r", "a\nb\n"),
    ],
)
def test_keys(session, tmp_path, typed, text):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from mtnlg.cli.chat_input import PromptReader

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(typed)
        assert PromptReader(session, tmp_path / "history").read() == text
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            PromptReader(session, tmp_path / "history").read()


def test_a_history_that_cannot_be_kept_is_said(session, tmp_path, capsys):
    from mtnlg.cli.chat_input import PromptReader

    (tmp_path / "file").write_text("")
    PromptReader(session, tmp_path / "file" / "history")
    assert "what you type is not remembered: " in capsys.readouterr().err


def test_where_the_history_is_kept(monkeypatch):
    from mtnlg.cli.chat_files import history_file

    monkeypatch.setenv("XDG_STATE_HOME", "/a")
    assert str(history_file()) == os.path.join("/a", "mtnlg", "chat_history")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file().parts[-3:-2] == ("state",)


# -- widths


@pytest.mark.parametrize("width", [20, 80])
def test_nothing_of_a_table_or_note_is_lost_in_a_narrow_terminal(monkeypatch, capsys, width):
    from mtnlg.cli.chat_screen import RichScreen

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    screen = RichScreen()
    rows = [("no_repeat_ngram_size", "0"), ("poet-zh", "下面是和一位诗人的对话。诗人总是用诗句回答。" * 2)]
    screen.table(rows)
    screen.note("several words that are broken between words")
    out = capsys.readouterr().out
    for text in sum(rows, ()):
        assert text in re.sub(r"\s", "", out)
    assert "…" not in out
    assert {"several", "words", "that", "are", "broken", "between"} <= set(out.split())


def test_a_line_that_is_only_too_long_does_not_look_like_a_new_one():
    from mtnlg.cli.chat_input import _continuation

    assert (_continuation(20, 1, 0), _continuation(20, 0, 1)) == (". ", "  ")


# -- bytes


@pytest.mark.parametrize(
    ("data", "words", "found"),
    [
        (b"caf\xe9 hi\n", [], "error: the input is not UTF-8: byte 0xe9 after 'caf'"),
        (b"one\r\ncaf\xe9\r\n", ["--lines"], "error: line 2: the input is not UTF-8"),
        ("春天\r\n".encode(), ["--json"], '"content": "春天"'),
        (None, [], "error: there is no question"),
    ],
)
def test_bytes_of_a_pipe_whatever_the_locale(folder, monkeypatch, capsys, data, words, found):
    stdin = data and io.TextIOWrapper(io.BytesIO(data), "ascii", "surrogateescape", newline="\n")
    monkeypatch.setattr("sys.stdin", stdin)
    cli.main(["chat", str(folder), "--max-new-tokens=2", *words])
    assert found in "".join(capsys.readouterr())


def test_what_is_typed_during_an_answer_is_not_written_into_it(monkeypatch):
    from mtnlg.cli.chat_input import keys_unseen

    mine, other = pty.openpty()
    with os.fdopen(mine, "rb", 0), os.fdopen(other, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        echoes = lambda: bool(termios.tcgetattr(terminal)[3] & termios.ECHO)  # noqa: E731
        with pytest.raises(ZeroDivisionError), keys_unseen():
            assert not echoes()
            raise ZeroDivisionError
        assert echoes()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with keys_unseen():
        pass

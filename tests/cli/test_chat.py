"""``mtnlg chat``: in a real pseudo-terminal, on a dumb one, in a pipe, and its parts."""

from __future__ import annotations

import io
import json
import re
import stat
import subprocess
import sys

import pytest
from tests.cli.chat_models import Terminal, make_session, save_model

from mtnlg.cli import main as cli
from mtnlg.tokens.chat_template import DEFAULT_CHAT_TEMPLATE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("chat"), DEFAULT_CHAT_TEMPLATE)


@pytest.fixture
def terminal():
    opened = []

    def open_terminal(*words, **environment):
        opened.append(Terminal(*map(str, words), **environment))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


# -- a real terminal


def test_a_conversation_in_a_terminal(base, terminal, tmp_path):
    state = str(tmp_path / "state")
    saved = tmp_path / "saved.json"
    mine = terminal("chat", base, "--max-new-tokens=12", "--seed=3", XDG_STATE_HOME=state)
    welcome = mine.expect_prompt()
    assert "4096 positions" in welcome
    assert "never trained to chat" in welcome
    assert "Ctrl-C stops an answer" in welcome

    mine.send("hello\x1b\rthere\r")  # Alt+Enter begins a new line
    mine.expect(r"Assistant: \S")
    mine.expect_prompt()
    mine.send("\x1b[200~two\nlines\x1b[201~\r")  # pasted text
    mine.expect(r"Assistant: \S")
    mine.expect_prompt()

    mine.send("/sta\t")  # completed
    mine.expect("/stats")
    mine.send("\r")
    mine.expect(r"12 tokens, \d+\.\d tokens/s, first after .* \(\d+\s+remembered\)\s+of\s+4096")
    mine.expect_prompt()
    mine.send("/set temperature 0\r")
    mine.expect("temperature is 0.0")
    mine.send("/set temprature 1\r")
    mine.expect("error: there is no setting 'temprature'")
    mine.expect_prompt()

    mine.send("/edit\r")  # the last question is in the line again
    mine.expect("two")
    mine.send(" more\r")
    mine.expect(r"Assistant: \S")
    mine.expect_prompt()

    mine.send("/set max_new_tokens 3500\r")
    mine.expect_prompt()
    mine.send("go on\r")
    mine.expect(r"Assistant: \S+")
    mine.send("\x03")  # Ctrl-C stops the answer and not the program
    mine.expect(r"\[stopped\]")
    mine.expect_prompt()
    mine.send("half a line\x03")
    mine.expect("/quit leaves")
    mine.expect_prompt()
    mine.send(f"/save {saved}\r")
    mine.expect("saved 6 messages")
    mine.expect_prompt()
    mine.send("\x04")
    assert mine.wait() == 0

    messages = json.loads(saved.read_text("utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert [m["content"] for m in messages[::2]] == ["hello\nthere", "two\nlines more", "go on"]
    history = tmp_path / "state" / "mtnlg" / "chat_history"
    assert "+there" in history.read_text("utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_dumb_terminal_gets_plain_lines_and_no_history_on_request(base, terminal, tmp_path):
    mine = terminal(
        *("chat", base, "--max-new-tokens=5", "--history=false", "--temperature=0"),
        TERM="dumb",
        XDG_STATE_HOME=str(tmp_path),
    )
    mine.expect("> ")
    mine.send("hello \\\nthere\n")
    mine.expect(r"\. ")
    mine.expect("> ")
    mine.send("/show\n")
    mine.expect("User: hello")
    mine.send("/set max_new_tokens 3900\n")
    mine.expect("is 3900\n> ")
    mine.send("more\n")
    mine.expect(r"more\n[^>]")
    mine.send("\x03")
    mine.expect(r"\[stopped\]")
    mine.send("/quit\n")
    assert mine.wait() == 0
    assert "\x1b" not in mine.seen
    assert not list(tmp_path.iterdir())


# -- a pipe


def test_a_pipe_gives_the_answer_and_nothing_else(base):
    command = [sys.executable, "-m", "mtnlg", "chat", str(base), "--max-new-tokens=8", "--temperature=0"]
    done = subprocess.run(command, input="hello\nthere\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")


def pipe(capsys, monkeypatch, text, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code = cli.main(["chat", *map(str, words), "--max-new-tokens=6", "--seed=1"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_tells_all_of_it(chat, capsys, monkeypatch):
    code, out, _ = pipe(capsys, monkeypatch, "hello\n", chat, "--json", "--system=be kind")
    found = json.loads(out)
    assert code == 0
    assert found["messages"][:2] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]
    assert found["messages"][2] == found["message"]
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 6


def test_json_in_goes_on_with_a_conversation(chat, capsys, monkeypatch, tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = [*messages, {"role": "user", "content": "c"}]
    _, out, _ = pipe(capsys, monkeypatch, json.dumps({"messages": asked}), chat, "--json")
    assert json.loads(out)["messages"][:3] == asked
    saved, again = tmp_path / "saved.json", tmp_path / "again.json"
    saved.write_text(json.dumps(messages))
    _, other, _ = pipe(capsys, monkeypatch, "c", chat, "--json", f"--load={saved}", f"--save={again}")
    assert json.loads(other)["message"] == json.loads(out)["message"]
    assert json.loads(again.read_text("utf-8"))["messages"][:3] == asked


def test_each_line_is_a_message_where_asked(chat, capsys, monkeypatch):
    code, out, _ = pipe(capsys, monkeypatch, "a\n\nb\n", chat, "--lines", "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 0
    assert [m["content"] for m in second["messages"][::2]] == ["a", "b"]
    assert second["messages"][:2] == first["messages"]


def test_a_pipe_tells_its_speed_beside_the_answer(chat, capsys, monkeypatch):
    _, out, err = pipe(capsys, monkeypatch, "a", chat, "--stats")
    assert re.match(r"6 tokens, [\d.]+ tokens/s, first after .* of 4096\n$", err)
    assert "tokens/s" not in out


def test_a_text_that_only_looks_like_json_is_a_question(chat, capsys, monkeypatch):
    for text in ("[1, 2]", "{}", "3", "{broken"):
        _, out, _ = pipe(capsys, monkeypatch, text, chat, "--json")
        assert json.loads(out)["messages"][0]["content"] == text


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", [], "there is no question"),
        ("x", ["--policy=forget"], "policy is 'forget'"),
        ("x", ["--temperature=-1"], "temperature is -1.0"),
        ("x", ["--persona=pirate"], "there is no persona 'pirate'"),
        ("x", ["--load=/no/such.json"], "No such file"),
        ("x", ["--chat-template=no/such.jinja"], "there is no such file"),
        ("x", ["--persona=poet", "--chat-template={{ x }}"], "not both"),
        ("x", ["--chat-template={% if %}"], "line 1"),
        ("x" * 9000, [], "shorten it"),
        ('{"messages": [{"role": "x", "content": ""}]}', ["--json"], "messages[0].role is 'x'"),
    ],
)
def test_what_is_wrong_is_said(base, capsys, monkeypatch, text, words, message):
    code, out, err = pipe(capsys, monkeypatch, text, base, *words)
    assert code == 2
    assert message in err
    assert out == ""


def test_the_chosen_persona_and_stop_strings_are_obeyed(base, capsys, monkeypatch):
    _, whole, _ = pipe(capsys, monkeypatch, "hello", base, "--temperature=0")
    letter = whole.strip()[2]
    _, out, _ = pipe(capsys, monkeypatch, "hello", base, "--temperature=0", "--stop", letter)
    assert out.strip() == whole.strip().partition(letter)[0].strip()
    _, other, _ = pipe(capsys, monkeypatch, "hello", base, "--temperature=0", "--persona=poet-zh")
    assert other != whole


# -- commands, without a terminal


@pytest.fixture
def session(chat):
    return make_session(chat)


def last(session, text):
    session.screen.lines.clear()
    session.handle(text)
    return "\n".join(session.screen.lines)


def test_settings_are_shown_and_changed(session):
    assert "temperature 1.0" in last(session, "/set")
    assert last(session, "/set top_k") == "top_k is 0"
    assert last(session, "/set top-k=5") == "top_k is 5"
    assert session.dialogue.options.rules.top_k == 5
    assert last(session, "/set seed none") == "seed is None"
    assert last(session, "/set policy refuse") == "policy is refuse"
    assert last(session, "/set max_new_tokens 3") == "max_new_tokens is 3"
    assert "error: top_p is 7" in last(session, "/set top_p 7")
    assert "expected a whole number" in last(session, "/set top_k many")
    assert "choose one of drop" in last(session, "/set policy forget")
    assert "choose on or off" in last(session, "/set stats maybe")
    assert session.dialogue.options.rules.top_p == 1.0
    last(session, "/set stats on")
    assert re.search(r"cut off.*; 3 tokens, ", last(session, "hello"))


def test_commands_work_on_the_conversation(session, tmp_path):
    assert "no answer yet" in last(session, "/stats")
    assert "system: be kind" in last(session, "/system be kind")
    session.handle("hello")
    session.handle("/retry")
    assert session.screen.answers[0] != session.screen.answers[1]
    session.handle("//not a command")
    assert session.dialogue.messages[-2]["content"] == "/not a command"
    assert "taken back: /not a command" in last(session, "/undo")
    session.handle("/edit hello again")
    assert [m["content"] for m in session.dialogue.messages if m["role"] == "user"] == ["hello again"]
    assert "cannot show the question again" in last(session, "/edit")
    file = tmp_path / "deep" / "saved.json"
    assert str(file) in last(session, f"/save {file}")
    assert last(session, "/clear") == "a new conversation begins."
    assert session.dialogue.messages == [{"role": "system", "content": "be kind"}]
    assert "You: hello again" in last(session, f"/load {file}")
    assert "system: (nothing)" in last(session, "/system -")
    assert "name the file" in last(session, "/load")
    assert "No such file" in last(session, "/load /no/such")
    file.write_text("{")
    assert "no saved conversation" in last(session, f"/load {file}")
    session.handle("/quit")
    assert session.is_over


def test_personas_are_chosen_and_explained(session):
    assert "own chat template" in last(session, "/persona")
    assert "model is Poet" in last(session, "/persona poet")
    session.handle("hello")
    assert "own chat template" in last(session, "/persona -")
    assert "there is no persona" in last(session, "/persona pirate")


def test_help_and_wrong_commands(session):
    text = last(session, "/help")
    assert "/set [name [value]]" in text
    assert "Alt+Enter" in text
    assert last(session, "/help undo").startswith("/undo")
    assert "did you mean /retry?" in last(session, "/rety")
    assert "/help shows them" in last(session, "/xyzzy")
    assert last(session, "   ") == ""


def test_completions(session):
    assert "/persona" in session.completions("/p")
    assert "temperature" in session.completions("/set te")
    assert session.completions("/set policy ") == ["drop", "summarise", "refuse"]
    assert "poet-zh" in session.completions("/persona p")
    assert session.completions("/load x") is None
    assert session.completions("/xyzzy x") == []


def test_an_answer_goes_on_where_it_was_cut_off(session):
    assert "no answer to go on with" in last(session, "/continue")
    session.handle("hello")
    first = session.dialogue.messages[-1]["content"]
    shown = last(session, "/continue")
    assert "cut off: /continue goes on" in shown
    [question, answer] = session.dialogue.messages
    assert question["content"] == "hello"
    assert answer["content"] == first + session.screen.answers[-1]
    assert session.dialogue.last_answer.usage.cached_tokens == 0  # shorter than a page
    session.handle("/undo")
    assert "no answer to go on with" in last(session, "/continue")


def test_a_question_reworded_goes_only_once_the_new_one_is_accepted(session):
    session.handle("hello")
    before = list(session.dialogue.messages)
    assert "error" in last(session, "/edit " + "x" * 9000)
    assert session.dialogue.messages == before
    keys = iter([KeyboardInterrupt, EOFError])

    class Reader:
        can_edit = True

        def read(self, draft=""):
            drafts.append(draft)
            raise next(keys)

    drafts = []
    session.can_edit = True
    session.handle("/edit")
    session.run(Reader())
    assert drafts == ["hello", ""]
    assert "(nothing was changed)" in session.screen.lines
    assert session.dialogue.messages == before


def test_a_file_goes_before_the_next_message_and_no_other(session, tmp_path):
    file = tmp_path / "my notes.txt"
    file.write_text("\ufeff你好\n\n", encoding="utf-8")
    assert "name a text file" in last(session, "/read")
    assert re.search(r"my notes.txt: \d+ tokens", last(session, f"/read {file}"))
    session.handle("what is it?")
    session.handle("and then?")
    asked = [m["content"] for m in session.dialogue.messages if m["role"] == "user"]
    assert asked == ["你好\n\nwhat is it?", "and then?"]
    file.write_bytes(b"\xff\xd8")
    assert "no text in UTF-8: invalid start byte at byte 0" in last(session, f"/read {file}")
    file.write_text(" ")
    assert "is empty" in last(session, f"/read {file}")


def test_stop_strings_are_a_setting_and_near_names_are_proposed(session):
    assert last(session, "/set stop") == "stop is none"
    assert last(session, r"/set stop \n##") == r"stop is '\n##'"
    assert session.dialogue.options.stop == ("\n##",)
    assert last(session, "/set stop none") == "stop is none"
    assert "did you mean temperature?" in last(session, "/set temp 1")
    assert "did you mean max_new_tokens?" in last(session, "/set max_tokens 1")


def test_names_that_other_programs_use(session):
    assert last(session, "/?") == last(session, "/help")
    assert last(session, "/help exit").startswith("/quit")
    session.handle("/bye")
    assert session.is_over


def test_what_model_it_is(session):
    session.about = "a model"
    session.handle("hello")
    text = last(session, "/info")
    assert "a model" in text and "own chat template" in text
    assert "2 messages" in text
    assert "You: hello" in last(session, "/show")
    session.handle("/persona poet-zh")
    assert "客人：hello" in last(session, "/show")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"message": []}', 'there are no "messages"'),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ("3", "must be a list"),
    ],
)
def test_a_file_that_is_no_conversation_is_explained(session, tmp_path, content, message):
    file = tmp_path / "saved.json"
    file.write_text(content)
    assert message in last(session, f"/load {file}")
    file.write_text('\ufeff[{"role": "user", "content": "a"}]', encoding="utf-8")
    assert last(session, f"/load {file}") == "You: a"

"""Every command in the documentation and in the verbs' help is run here, or checked and run elsewhere."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.docs.commands import (
    PAGES,
    ROOT,
    RUN,
    TINY,
    TINY_TUNING,
    blocks,
    feed,
    furnish,
    shell_commands,
    split_command,
)

from mtnlg.cli import main as cli

SHELL_PAGES = [page for page in PAGES if shell_commands(page)]
RULES = ("constraints", "verse", "speculation")
PYTHON_PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md")),
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("configuration", "engine", "export", "chat", "chat-templates", "sampling", *RULES)
    ),
]
LARGE_RECIPES = ("mt-nlg-530b", "1t", "gpu")  # read here, too large to run


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    place = tmp_path_factory.mktemp("furnished")
    furnish(place)
    return place


@pytest.fixture
def place(furnished, tmp_path, monkeypatch):
    """A folder of its own for each page, where its commands run in order."""
    for folder in (tmp_path, tmp_path / "runs", tmp_path / "data"):
        folder.mkdir(exist_ok=True)
        for path in (furnished / folder.relative_to(tmp_path)).iterdir():
            if path.name not in ("runs", "data"):
                (folder / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Trial:
    """Runs the commands of one page, with small models for large ones."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.steps = 0

    def run(self, line, with_ranks=False):
        words, stdin = split_command(line)
        handler = getattr(self, f"_{words[0].lstrip('.').replace('-', '_') or 'source'}", None)
        assert handler is not None, f"no test knows how to try: {line}"
        self.monkeypatch.setattr("sys.stdin", feed(stdin))
        handler(words[1:], with_ranks)

    def _mtnlg(self, words, with_ranks):
        verb, rest = words[0], words[1:]
        if verb.startswith("-") or "--help" in rest:
            assert cli.main(words) == 0
        elif any("-parallel-size" in word for word in rest) and verb != "train":
            self._in_a_process_of_its_own(words)  # ranks are joined once in the life of a process
        elif verb == "demo":
            cli.verb_parser("demo").read(rest)  # run by tests/cli/test_demo.py
        elif verb == "chat" and not sys.stdin.getvalue():
            cli.verb_parser("chat").read(rest)  # a person types: tests/cli/test_chat.py does
        elif verb == "serve":
            cli.verb_parser("serve").read(rest)  # it does not end by itself: tests/serving runs it
        elif verb == "train":
            self._train(rest, with_ranks)
        elif verb == "tune":
            assert cli.main([*words, *TINY_TUNING]) == 0
        else:
            if verb == "encode" and not Path("tokenizer").exists():  # made on the page before
                Path("tokenizer").symlink_to(Path(RUN).resolve() / "tokenizer")
            assert cli.main(words) == 0

    def _in_a_process_of_its_own(self, words):
        done = subprocess.run([sys.executable, "-m", "mtnlg", *words], capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def _train(self, words, with_ranks):
        from mtnlg.cli import train

        parsed = train.parse(cli.verb_parser("train"), words)  # as it stands
        is_large = any(name in words[0] for name in LARGE_RECIPES)
        if is_large or (parsed.run_config.layout.num_ranks > 1 and not with_ranks):
            return
        self.steps += 2
        assert cli.main(["train", *words, *TINY, f"--stop.steps={self.steps}"]) == 0

    def _make(self, words, _with_ranks):
        targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets

    def _source(self, words, _with_ranks):
        assert words == [".venv/bin/activate"]  # made by scripts/setup_environment.sh

    def _pip(self, words, _with_ranks):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(project["optional-dependencies"])

    def _curl(self, words, _with_ranks):
        assert any(word.startswith("http://127.0.0.1:8000/") for word in words)
        assert "docs" in ROOT.joinpath("tests/serving/test_docs.py").read_text()  # runs it

    def _python(self, words, _with_ranks):
        if words[0] == "-m":
            parts = words[1].split(".")
            assert parts[0] in ("pytest", "mtnlg") or ROOT.joinpath(*parts).with_suffix(".py").exists()
        else:
            assert (ROOT / words[0]).exists()  # a benchmark, tried by its own test


@pytest.mark.parametrize("page", SHELL_PAGES, ids=[page.name for page in SHELL_PAGES])
def test_the_commands_of_a_page_work_in_order(page, place, monkeypatch, capsys):
    trial = Trial(monkeypatch)
    for line in shell_commands(page):
        trial.run(line, with_ranks=page.name == "README.md")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_examples_in_the_help_work(verb, place, monkeypatch):
    from importlib import import_module

    examples = import_module(f"mtnlg.cli.{verb}").EXAMPLE.strip().splitlines()
    assert examples
    for line in examples:
        words = shlex.split(line.split(" | ")[-1])
        assert words[:2] == ["mtnlg", verb]
        if verb in ("tokenizer", "encode"):
            cli.verb_parser(verb).read(words[2:])  # tests/tokens and the pages run them
        else:
            if "runs/demo-lora" in words:  # left by a run of another verb's
                before = "mtnlg tune runs/demo chats.jsonl --method lora --out runs/demo-lora"
                Trial(monkeypatch).run(before)
            Trial(monkeypatch).run(line)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=[page.name for page in PYTHON_PAGES])
def test_the_python_of_a_page_runs(page, place, capsys):
    (place / "runs" / "mine").symlink_to((place / "runs" / "demo").resolve())
    for code in blocks(page, "python"):
        if "http://127.0.0.1:8000/" in code:
            continue  # tests/serving/test_docs.py runs it
        exec(compile(code, page.name, "exec"), {})
        out = capsys.readouterr().out
        for said in re.findall(r"# ([\d,]{8,})$", code, re.MULTILINE):
            assert said in out


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_a_command_outside_sh_blocks_is_only_a_pattern():
    """One with a placeholder such as SOURCE or CONFIG; whatever can be typed stands in an sh block."""
    for page in PAGES:
        for line in "".join(blocks(page, "")).splitlines():
            if re.match(r"(mtnlg|make|python|pip|torchrun|srun) ", line):
                assert re.search(r"\b[A-Z]{3,}\b", line), f"{page.name}: {line}"


def test_an_unknown_command_would_be_noticed(monkeypatch):
    with pytest.raises(AssertionError, match="no test knows"):
        Trial(monkeypatch).run("frobnicate --now")

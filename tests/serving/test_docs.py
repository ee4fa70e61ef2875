"""Every request that the pages show, to a real server; every option and error they name."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.docs.commands import blocks, shell_commands, split_command

from mtnlg.cli import main as cli
from mtnlg.config.serving import ServerConfig
from mtnlg.serving.keys import Keys

ROOT = Path(__file__).resolve().parents[2]
FRONT_PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
SERVE, API = ROOT / "docs" / "serve.md", ROOT / "docs" / "api.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def demo(start):
    with start(name="demo") as running:
        yield running


@pytest.fixture(scope="module")
def mine(start):
    with start(name="mine") as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", FRONT_PAGES, ids=["english", "chinese"])
def test_requests_of_a_front_page_are_answered(mine, page, capsys):
    commands = [line for line in shell_commands(page) if line.startswith("curl")]
    assert commands
    for line in commands:
        ask(line, mine.url)
    examples = [code for code in blocks(page, "python") if ADDRESS in code]
    assert examples
    for code in examples:
        exec(compile(code.replace(ADDRESS, mine.url), page.name, "exec"), {})
        assert capsys.readouterr().out


def ask(line, url):
    words, _ = split_command(line.replace(ADDRESS, url))
    done = subprocess.run(
        [*words, "--fail-with-body", "--silent"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", [SERVE, API], ids=["serve", "api"])
def test_requests_of_a_page_are_answered(demo, page):
    commands = [line for line in shell_commands(page) if line.startswith("curl")]
    assert len(commands) >= 3
    for line in commands:
        ask(line, demo.url)


@pytest.mark.parametrize("page", [SERVE, API], ids=["serve", "api"])
def test_the_python_of_a_page_runs(demo, page, capsys):
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code.replace(ADDRESS, demo.url), page.name, "exec"), names)
    assert capsys.readouterr().out


def test_the_key_file_of_the_page_is_one(tmp_path):
    (tmp_path / "keys.yaml").write_text(blocks(SERVE, "yaml")[0], encoding="utf-8")
    keys = Keys.of_config(ServerConfig(api_key_file=str(tmp_path / "keys.yaml")))
    assert keys.caller("Bearer sk-alice-2f9c1d7e8b6a").allowance.concurrency == 4
    assert keys.caller("Bearer sk-bob-2f9c1d7e8b6a").name == "bob"


def test_every_option_is_on_a_page():
    options = {
        text
        for action in cli.verb_parser("serve")._actions
        for text in action.option_strings
        if text.startswith("--") and not text.startswith("--no") and not text.endswith("+")
    }
    text = SERVE.read_text(encoding="utf-8")
    assert {option for option in options if f"`{option}`" not in text} <= {
        "--help",
        "--config",
        "--print_config",
    }


def test_every_path_and_metric_is_on_a_page(demo):
    text = API.read_text(encoding="utf-8")
    for path in demo.get("/openapi.json").json()["paths"]:
        assert path.replace("{model}", "NAME") in text
    shown = SERVE.read_text(encoding="utf-8")
    for name in re.findall(r"`?(mtnlg_\w+)", shown):
        assert f"# HELP {name} " in demo.get("/metrics").text, name


def test_every_field_is_on_the_page():
    from mtnlg.serving.chat_schemas import ChatRequest
    from mtnlg.serving.schemas import CompletionRequest

    text = API.read_text(encoding="utf-8")
    for name in {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"modalities"}:
        assert f"`{name}" in text, name


def test_every_code_of_an_error_is_real():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src" / "mtnlg" / "serving").glob("*.py"))
    table = API.read_text(encoding="utf-8").split("## Errors")[1]
    for row in re.findall(r"^\| \d+.*\| (`.*`.*) \|$", table, re.MULTILINE):
        for code in re.findall(r"`(\w+)`", row):
            assert f'"{code}"' in source, code

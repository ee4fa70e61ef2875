"""The set-up that `make demo` and `make test` run first, with a Python that only writes down its calls."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *"{failing}"*) exit 1;; esac
case "$*" in *editable*) touch "{venv}/bin/mtnlg"; chmod +x "{venv}/bin/mtnlg";; esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that set-up reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_environment.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def fake_environment(checkout, failing="never"):
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin" / "python"
    python.write_text(FAKE_PYTHON.format(log=checkout / "log", failing=failing, venv=venv))
    python.chmod(0o755)


def set_up(checkout, **environment):
    (checkout / "log").unlink(missing_ok=True)
    command = ["sh", str(checkout / "scripts" / "setup_environment.sh"), ".venv", "plot,data"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    log = checkout / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_the_first_call_installs_pinned_and_the_second_does_nothing(checkout):
    fake_environment(checkout)
    code, calls = set_up(checkout)
    installs = [call for call in calls if "pip install" in call]
    assert code == 0
    assert all("--constraint constraints.txt" in call for call in installs)
    assert installs[-1].endswith("--editable .[plot,data]")
    assert set_up(checkout) == (0, [])


def test_torch_comes_first_and_may_have_an_index_of_its_own(checkout):
    fake_environment(checkout, failing="import torch")
    _, calls = set_up(checkout, TORCH_INDEX_URL="https://example.org/whl")
    installs = [call for call in calls if "pip install" in call]
    assert installs[0].endswith("--index-url https://example.org/whl torch")
    assert not any("example.org" in call for call in installs[1:])


def test_an_interrupted_call_is_made_up_for(checkout):
    fake_environment(checkout, failing="editable")
    code, _ = set_up(checkout)
    assert code != 0
    fake_environment(checkout)
    assert set_up(checkout)[0] == 0
    assert set_up(checkout) == (0, [])


def test_new_pins_are_installed(checkout):
    fake_environment(checkout)
    set_up(checkout)
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert set_up(checkout)[1]


def test_without_a_new_enough_python_it_says_so(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("sh", "dirname", "cat", "cksum", "tr", "rm"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    command = ["sh", str(checkout / "scripts" / "setup_environment.sh"), ".venv", "dev"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path / "bin")})
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed" in done.stderr


def test_every_dependency_is_pinned():
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["data"], *extras["plot"], *extras["dev"]]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
        assert name == "mtnlg" or name in pinned, requirement

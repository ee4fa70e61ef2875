"""The rules of the house that a reader can rely on: what may import what, and how long things get."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mtnlg"
# From the bottom to the top; a folder imports only from itself and from those before it.
LOWER = "native config corpus tokens model quantization parallel interop generation training"
UPPER = "tuning planning explain evaluation serving pretrained encoder_decoder api cli"
ORDER = f"{LOWER} {UPPER}".split()
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree):
    """(module, line) of every import of ours in a file, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno
            for alias in node.names if node.module == "mtnlg" else ():
                yield f"mtnlg.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno


def upward_imports(room, tree):
    rank = ORDER.index(room)
    for module, line in imports_of(tree):
        parts = module.split(".")
        if parts[0] == "mtnlg" and len(parts) > 1 and parts[1] in ORDER and ORDER.index(parts[1]) > rank:
            yield f"line {line}: {module}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_downwards(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return  # the doors of the package
    assert room in ORDER
    assert not list(upward_imports(room, ast.parse(path.read_text(encoding="utf-8"))))


def test_an_upward_import_would_be_seen():
    tree = ast.parse("def f():\n    from mtnlg.training.loop import train\nfrom mtnlg import api\n")
    assert set(upward_imports("model", tree)) == {"line 2: mtnlg.training.loop", "line 3: mtnlg.api"}


def test_modules_do_not_import_each_other_in_a_circle():
    names = {module_name(path) for path in FILES}
    graph = {
        module_name(path): set(top_level_modules(ast.parse(path.read_text(encoding="utf-8")), names))
        for path in FILES
    }
    for name in graph:
        assert find_circle(graph, name) is None


def module_name(path):
    return ".".join(("mtnlg", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def top_level_modules(tree, names):
    """Modules that are imported when the file is loaded (not inside functions or TYPE_CHECKING)."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:  # a submodule where there is one, else the module itself
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def find_circle(graph, start):
    waiting, seen = [*graph[start]], set()
    while waiting:
        name = waiting.pop()
        if name == start:
            return name
        if name in graph and name not in seen:
            seen.add(name)
            waiting += graph[name]
    return None


def test_a_circle_would_be_seen():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}, "a") == "a"
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": set()}, "a") is None


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_the_model_knows_no_ranks_precision_or_device(path):
    text = path.read_text(encoding="utf-8")
    ranks = r"torch\.distributed|DTensor|get_rank|world_size|ProcessGroup"
    devices = r"autocast|is_cuda|\.cuda\(|device\.type"
    assert re.findall(f"{ranks}|{devices}", text) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < MOST_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= MOST_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_left_undone_or_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplementedError" not in ast.dump(node.exc), node.lineno
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not silent, f"line {node.lineno}: an exception is swallowed"


def test_tests_mirror_the_package():
    folders = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"
    }
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "docs", "benchmarks", "notebooks", "data"} <= rooms

"""Every message of the parallel engine is on the page that explains them."""

import ast
import re

import pytest
from tests.docs.commands import ROOT

PACKAGE = ROOT / "src" / "mtnlg"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
RULES = sorted((PACKAGE / "config").glob("*_rules.py"))
SOURCES = [
    *RULES,
    PACKAGE / "config" / "division.py",
    PACKAGE / "planning" / "auto_layout.py",
    PACKAGE / "training" / "loss_scale.py",
    PACKAGE / "training" / "checkpoints.py",
    PACKAGE / "training" / "resume.py",
    PACKAGE / "training" / "step.py",
    *(PACKAGE / "parallel").glob("*.py"),
]
ERRORS = {"ConfigError", "TrainingError", "CheckpointError"}
VALUE = "\0"  # where a message has a value


def messages(tree):
    """(line, fixed parts) of the texts that a file raises, appends to problems or returns in a list."""
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = function.value if isinstance(function, ast.Attribute) else None
            if name in ERRORS or (name == "append" and getattr(owner, "id", "") == "problems"):
                texts = node.args[:1]
        elif isinstance(node, (ast.Return, ast.AugAssign)) and isinstance(node.value, ast.List):
            texts = node.value.elts
        for text in texts:
            if parts := fixed_parts(text):
                yield node.lineno, parts


def fixed_parts(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
    return []


def what_is_wrong(parts):
    """The longest fixed part of a message's first sentence, behind the setting that it begins with."""
    text = re.sub(r"^[^:;]{0,60}: ", "", "".join(parts))
    sentence = re.split(r"[.;] |[.:]$", text, maxsplit=1)[0]
    return max((part.strip(" .,:()\n") for part in sentence.split(VALUE)), key=len)


def all_messages():
    for path in SOURCES:
        for line, parts in messages(ast.parse(path.read_text(encoding="utf-8"))):
            yield pytest.param(parts, id=f"{path.name}:{line}")


@pytest.mark.parametrize("parts", list(all_messages()))
def test_a_message_is_explained(parts):
    found = what_is_wrong(parts)
    if len("".join(parts)) > 8:  # a shorter one only passes another message on
        assert found in PAGE, f"docs/troubleshooting.md does not explain: {found}"


def test_messages_are_found():
    tree = ast.parse("def f():\n    raise ConfigError(f'layout.x is {x}: it must be even.')\n")
    assert list(messages(tree)) == [(2, ["layout.x is ", VALUE, ": it must be even."])]
    assert len(list(all_messages())) > 40


def test_each_row_has_a_message_a_cause_and_a_cure():
    for line in PAGE.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, line
            assert all(cells), line


def test_settings_that_the_page_names_exist():
    from mtnlg.config import RunConfig
    from mtnlg.config.check import field_types, setting_names

    names = set(setting_names(RunConfig))
    names |= {name.rpartition(".")[0] for name in names}  # sections inside of sections
    sections = "|".join(field_types(RunConfig))
    named = re.findall(rf"\b(?:{sections})\.[a-z_]+\b", PAGE)
    assert {name for name in named if name not in names} == set()

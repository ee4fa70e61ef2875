"""The notebooks run from the first cell to the last, with less training than they ask for."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(notebook.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sources = code_cells(notebook)
    assert sum("MINUTES = 1.0" in source for source in sources) == 1
    names: dict[str, object] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(sources):
            short = source.replace("MINUTES = 1.0", "MINUTES = 0.05")
            exec(compile(short, f"{notebook.name}, code cell {number}", "exec"), names)
    text = printed.getvalue()
    assert "529.6 billion" in text
    assert "秋天的夜晚，" in text
    assert "bits a character" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_plain(notebook):
    """No magics, which would need a notebook server, and no paths of the machine it was written on."""
    for source in code_cells(notebook):
        assert not any(line.lstrip().startswith(("%", "!")) for line in source.splitlines())
        assert "/home/" not in source

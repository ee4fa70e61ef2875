"""The figures of the documentation: drawn by code, all there, and true."""

import importlib.util
import re
import sys

import pytest
from tests.docs.commands import PAGES, ROOT


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib", reason="pip install 'mtnlg[plot]'")
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "scripts" / "draw_figures.py")
    module = sys.modules["draw_figures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(page):
    return set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")))


def test_every_picture_of_a_page_is_there():
    for page in PAGES:
        for path in shown(page):
            assert path.startswith("http") or (page.parent / path).exists(), f"{page.name}: {path}"


def test_the_script_draws_what_the_page_shows(figures):
    page = ROOT / "docs" / "parallelism.md"
    assert {f"images/{name}" for name in figures.FIGURES} == shown(page)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "batches"), [(2, 2), (4, 8), (4, 5)])
def test_idle_shares_are_those_of_the_formula(figures, schedule, ranks, batches):
    found = figures.idle_share(figures.timeline(schedule, ranks, batches))
    assert found == pytest.approx((ranks - 1) / (batches + ranks - 1))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs"])
def test_idle_shares_of_loops_are_those_of_the_formula(figures, schedule):
    found = figures.idle_share(figures.timeline(schedule, 4, 8))
    assert found == pytest.approx(3 / (2 * 8 + 3))


def test_each_stage_runs_each_micro_batch_once(figures):
    for schedule in figures.PIPELINE_SCHEDULES:
        actions = [action for rank in figures.timeline(schedule, 4, 8) for action in rank]
        forward = [(action.stage, action.micro_batch) for action in actions if action.kind == "F"]
        weights = [(action.stage, action.micro_batch) for action in actions if action.kind in "BW"]
        assert len(forward) == len(set(forward))
        assert sorted(forward) == sorted(weights), schedule


def test_figures_are_drawn_again_from_the_same_things(figures, tmp_path):
    """Those committed show what the code says now (their pixels and paths depend on matplotlib)."""
    for name in ("rank-order.svg", "context-chunks.svg", "zero-memory.svg"):
        figures.matplotlib.rcParams.update({"svg.hashsalt": "mtnlg", "svg.fonttype": "none"})
        figures.FIGURES[name]().savefig(tmp_path / name)
        drawn, kept = (
            re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))
            for path in (tmp_path / name, figures.OUT / name)
        )
        assert drawn == kept, f"{name}: draw it again with python scripts/draw_figures.py"

import io

import pytest

from mtnlg.cli import terminal
from mtnlg.cli.terminal import ProgressDisplay, duration, print_table, quantity


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "tokens", "0 tokens"),
        (999, "tokens", "999 tokens"),
        (0.25, "steps", "0.25 steps"),
        (12_345, "tokens", "12.3k tokens"),
        (1_234_567, "tokens", "1.23M tokens"),
        (529.6e9, "parameters", "530B parameters"),
        (1_500_000, "bytes", "1.5 MB"),
        (999, "bytes", "999 bytes"),
        (5, "", "5"),
    ],
)
def test_quantities_read_well(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (12.6, "13 s"), (75, "1 min 15 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(terminal.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def lines_of(clock, reports, **options):
    stream = io.StringIO()
    with ProgressDisplay(stream, **options) as progress:
        for at, *report in reports:
            clock.now = 100.0 + at
            progress(*report)
    return stream.getvalue().splitlines()


def test_short_work_is_silent(clock):
    reports = [(0, "reading", 0, 10, "bytes"), (1.0, "reading", 10, 10, "bytes")]
    assert lines_of(clock, reports) == []


def test_long_work_tells_rate_and_time_left_in_a_log(clock):
    reports = [(at, "encoding", at * 100, 4000, "documents") for at in range(0, 41)]
    lines = lines_of(clock, reports)
    assert lines[0] == "encoding: 1000 of 4000 documents (25%), 100 documents/s, 30 s left"
    assert lines[-1] == "encoding: 4000 documents, 100 documents/s, in 40 s"
    assert len(lines) == 4


def test_a_new_stage_ends_the_one_before(clock):
    reports = [(0, "first", 0, None, ""), (5, "first", 50, None, ""), (6, "second", 0, None, "")]
    assert lines_of(clock, reports) == ["first: 50, 8.33/s, in 6.0 s"]


def test_a_terminal_gets_a_bar(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with ProgressDisplay(stream) as progress:
        for at in range(5):
            clock.now = 100.0 + at
            progress("encoding", at, 10, "bytes")
    assert "encoding" in stream.getvalue()
    assert "in 4.0 s" in stream.getvalue()


def test_tables_are_aligned(capsys):
    print_table(["text", "loss"], [["english", 1.23456], ["zh", 10]], title="held out")
    assert capsys.readouterr().out.splitlines() == [
        "held out",
        "text     loss",
        "english  1.235",
        "zh       10",
    ]

"""Compiling in the background, what is kept of it, and what happens where that cannot be."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mtnlg.native import NoCompilerError, NoFolderError, begin, cache, is_busy, library
from mtnlg.native.compiler import processor

DAY = 86400
SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def source(tmp_path):
    """A small C++ file, in a folder of its own."""
    path = tmp_path / "sources" / "answer.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE % 42)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mtnlg"


@pytest.fixture
def no_folder(folder, monkeypatch):
    """A cache that cannot be: where it should lie there is a file."""
    folder.parent.write_text("")
    cache._own_folder.cache_clear()
    yield folder
    cache._own_folder.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that notes down each call, and waits as long as ``slow`` is there."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$$" >> {tmp_path}/calls\nwhile [ -e {tmp_path}/slow ]; do sleep 0.01; done\n'
        f"[ -e {tmp_path}/fail ] && echo 'answer.cpp:1: error: no good' >&2 && exit 1\nexec g++ \"$@\"\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def num_calls(compiler):
    calls = compiler.with_name("calls")
    return len(calls.read_text().split()) if calls.exists() else 0


def answer_of(path):
    return ctypes.CDLL(str(path)).answer()


def names(folder):
    return sorted(path.name for path in folder.glob("*.so"))


def wait_for(is_so):
    ends = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_it_is_compiled_once_and_again_when_its_text_changes(source, folder, compiler):
    first = library(source)
    assert (answer_of(first), library(source), num_calls(compiler)) == (42, first, 1)
    source.write_text(SOURCE % 43)
    second = library(source)
    assert (answer_of(second), num_calls(compiler)) == (43, 2)
    source.with_name("beside.h").write_text("// one")
    source.write_text('  #include "beside.h"\n' + SOURCE % 43)
    third = library(source)
    source.with_name("beside.h").write_text("// two")
    assert len({first, second, third, library(source)}) == 4
    source.write_text(f"// flag: -DANSWER=5\n{SOURCE.replace('%d', 'ANSWER')}")
    assert answer_of(library(source)) == 5


def test_what_was_begun_is_waited_for_and_not_begun_twice(source, folder, compiler):
    slow = compiler.with_name("slow")
    slow.touch()
    begin({source: []})
    begin({source: []})
    wait_for(lambda: num_calls(compiler) == 1)
    assert not [name for name in names(folder) if cache.PART not in name]
    assert is_busy()
    threading.Timer(0.1, slow.unlink).start()
    assert answer_of(library(source)) == 42
    wait_for(lambda: not is_busy())
    assert num_calls(compiler) == 1 and len(names(folder)) == 1
    begin({source: []})
    assert num_calls(compiler) == 1


PROGRAM = "import sys; from pathlib import Path; from mtnlg import native; "


def start(code, source, **options):
    return subprocess.Popen([sys.executable, "-c", PROGRAM + code, str(source)], **options)


def test_processes_that_start_together_compile_it_once(source, folder, compiler):
    compiler.with_name("slow").touch()
    code = "path = Path(sys.argv[1]); native.begin({path: []}); print(flush=True); native.library(path)"
    programs = [start(code, source, stdout=subprocess.PIPE) for _ in range(3)]
    for program in programs:
        assert program.stdout.readline() == b"\n"
    compiler.with_name("slow").unlink()
    assert [program.wait(60) for program in programs] == [0, 0, 0]
    assert num_calls(compiler) == 1 and len(names(folder)) == 1
    for program in programs:
        program.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_stopped_ends_its_compilers(source, folder, compiler, number):
    compiler.with_name("slow").touch()
    code = (
        "from mtnlg.cli.main import with_termination_signal; with_termination_signal();"
        "path = Path(sys.argv[1]); native.begin({path: []}); native.library(path)"
    )
    program = start(code, source, stderr=subprocess.DEVNULL)
    wait_for(lambda: num_calls(compiler) == 1)
    program.send_signal(number)
    assert program.wait(60) not in (0, None)
    (process,) = compiler.with_name("calls").read_text().split()
    wait_for(lambda: not Path(f"/proc/{process}").exists())
    assert names(folder) == []


def test_a_program_that_ends_early_leaves_what_is_finished(source, folder, compiler):
    code = (
        "native.begin({Path(sys.argv[1]): []}); from mtnlg.native import compiler as made;"
        "[job._process.wait() for job in made._running.values()]"
    )
    assert start(code, source).wait(60) == 0
    assert len(names(folder)) == 1
    library(source)
    assert num_calls(compiler) == 1


def test_what_fails_is_told_when_it_is_wanted(source, folder, compiler, monkeypatch):
    compiler.with_name("fail").touch()
    begin({source: []})
    with pytest.raises(subprocess.SubprocessError, match=r"compiler failed: answer\.cpp:1: error: no good"):
        library(source)
    assert names(folder) == []
    with pytest.raises(OSError, match="the processor does not say that it has magic"):
        library(source, ["magic"])
    begin({source: ["magic"]})
    monkeypatch.setenv("CXX", "/nowhere/g++")
    begin({source: []})
    with pytest.raises(subprocess.SubprocessError, match=r"/nowhere/g\+\+"):
        library(source)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    begin({source: []})
    with pytest.raises(NoCompilerError, match="there is no C"):
        library(source)
    assert names(folder) == []


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    source, no_folder, compiler, caplog, monkeypatch
):
    other = source.with_name("other.cpp")
    other.write_text(SOURCE % 7)
    begin({source: []})
    assert [answer_of(library(path)) for path in (source, other, source)] == [42, 7, 42]
    assert num_calls(compiler) == 2
    (record,) = [record for record in caplog.records if "cannot be kept" in record.message]
    assert "Not a directory" in record.message and "XDG_CACHE_HOME" in record.message
    place = library(source).parent
    assert place.stat().st_mode & 0o77 == 0  # another user must not put programs there
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert library(source).parent == place


def test_the_folder_of_a_process_goes_with_it(source, no_folder):
    code = "print(native.library(Path(sys.argv[1])))"
    program = start(code, source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    place, said = program.communicate(timeout=60)
    assert place.strip().endswith(".so") and not Path(place.strip()).parent.exists()
    assert said.count("cannot be kept") == 1


def test_a_cache_that_forbids_programs_is_not_used(source, folder, compiler, monkeypatch, caplog):
    kept = library(source)
    monkeypatch.setattr(cache, "_forbids_programs", lambda where: where == folder)
    cache._own_folder.cache_clear()
    assert library(source).parent != kept.parent
    assert "noexec" in caplog.text
    cache._own_folder.cache_clear()


def test_where_no_folder_allows_programs_there_is_no_library(source, folder, compiler, monkeypatch):
    monkeypatch.setattr(cache, "_forbids_programs", lambda where: True)
    cache._own_folder.cache_clear()
    begin({source: []})
    with pytest.raises(NoFolderError, match=r"noexec.* and .* allows no programs"):
        library(source)
    assert num_calls(compiler) == 0


def test_a_cache_that_may_only_be_read_serves(source, folder, compiler, monkeypatch):
    kept = library(source)
    os.utime(kept, (0, 0))

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", refuse)
    assert (library(source), num_calls(compiler)) == (kept, 1)


def test_what_nobody_used_for_a_month_goes(source, folder):
    folder.mkdir(parents=True)
    now = time.time()
    ages = {
        "answer-1.so": 31, "other-1.so": 31, "answer-2.so": 29, f"answer{cache.PART}1.so": 2,
        f"answer{cache.PART}2.so": 0.5, "tmpabc.so": 2, "notes.txt": 99,
    }  # fmt: skip
    for name, days in ages.items():
        (folder / name).write_text("")
        os.utime(folder / name, (now - days * DAY,) * 2)
    new = library(source)
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    assert left == {"answer-2.so", f"answer{cache.PART}2.so", "notes.txt", new.name}
    os.utime(new, (now - 29 * DAY,) * 2)
    assert library(source) == new  # that is a use
    assert time.time() - new.stat().st_mtime < DAY


def test_the_processor_says_what_it_can():
    assert len(processor().split()) > 1 if sys.platform == "linux" else processor() == ""

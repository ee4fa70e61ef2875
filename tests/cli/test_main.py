import os
import signal
import subprocess
import sys

import pytest

from mtnlg.cli import main as cli
from mtnlg.config import CheckpointError, ConfigError, DataError, NotYetError, TrainingError


def run(capsys, *argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {verb}  " in out or f"  {verb} " in out for verb in cli.VERBS)


HELP_SCRIPT = """
import sys, time
from mtnlg.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "numpy", "tokenizers", "transformers", "rich", "pyarrow"} & set(sys.modules)
print(code, len(heavy), time.process_time())
"""


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_is_instant_and_imports_nothing_heavy(verb):
    """In processor time, which a busy machine does not stretch as it stretches the clock's."""
    words = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run([sys.executable, "-c", HELP_SCRIPT, *words], capture_output=True, text=True)
    code, num_heavy, seconds = done.stdout.splitlines()[-1].split()
    assert (code, num_heavy) == ("0", "0")
    assert float(seconds) < 0.5
    assert "example:" in done.stdout or not verb


def test_version(capsys):
    from mtnlg import __version__

    assert run(capsys, "--version") == (0, f"mtnlg {__version__}\n", "")


def test_without_arguments_the_help_is_a_usage_error(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "usage: mtnlg" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["frobnicate"], "choose one of demo, tokenizer"),
        (["generate", "x"], "prompt"),
        (["generate", "x", "y", "--temprature", "1"], "did you mean --temperature?"),
        (["generate", "x", "y", "--temperature", "hot"], "--temperature is 'hot': expected a number"),
        (["generate", "x", "y", "--seed=hot"], "--seed is 'hot': expected a whole number or null"),
        (["evaluate", "/no/such/model"], "is not a run's folder"),
        (["train"], "config"),
        (["train", "/no/such/recipe.yaml"], "does not exist"),
        (["train", "a.yaml", "b.yaml"], "one argument too many"),
        (["train", "--seed=1"], "CONFIG is missing"),
        (["demo", "--minutes", "0"], "must be greater than 0"),
    ],
)
def test_wrong_usage_is_explained_with_code_2(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.startswith("error: ")


def test_dashes_and_underscores_mean_the_same():
    parser = cli.verb_parser("generate")
    for option in ("--max-new-tokens", "--max_new_tokens"):
        assert parser.read(["m", "p", option, "7"]).max_new_tokens == 7
        assert parser.read(["m", "p", f"{option}=7"]).max_new_tokens == 7


def test_a_prompt_may_begin_with_dashes():
    assert cli.verb_parser("generate").read(["m", "--", "--seed"]).prompt == "--seed"


def test_train_reads_recipe_and_overrides_in_any_order(tmp_path):
    from mtnlg.cli import train

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    words = ["--seed", "2", str(recipe), "--print-config", "--batch.micro_batch_size=4"]
    parsed = train.parse(cli.verb_parser("train"), words)
    assert (parsed.run_config.seed, parsed.run_config.batch.micro_batch_size) == (2, 4)
    assert parsed.print_config
    assert not parsed.prepare


def test_print_config_writes_what_loads_again(capsys, tmp_path):
    from mtnlg.config.load import load_run_config

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: tiny-1m\ndata: {sources: [a.txt]}\n")
    code, out, _ = run(capsys, "train", str(recipe), "--print_config", "--seed=7")
    (tmp_path / "whole.yaml").write_text(out)
    assert code == 0
    assert load_run_config(tmp_path / "whole.yaml") == load_run_config(recipe, ["--seed=7"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError(["a is 1.", "b is 2."]), 2, "error: 2 problems:\n  - a is 1.\n  - b is 2."),
        (ConfigError("a is 1."), 2, "error: a is 1."),
        (DataError("x.jsonl, line 3"), 2, "error: x.jsonl, line 3"),
        (NotYetError("quantize"), 2, "error: quantize"),
        (CheckpointError("damaged"), 2, "error: damaged"),
        (TrainingError("too many"), 1, "error: too many"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "directory: a.txt"),
        (OSError(28, "No space left on device", "w.bin"), 1, "error: No space left on device: w.bin"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
    ],
)
def test_errors_become_a_message_and_a_code(capsys, monkeypatch, error, code, text):
    def fail(_arguments):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    got, _, err = run(capsys, "demo")
    assert got == code
    assert text in err


def test_a_failing_disk_is_not_a_usage_error():
    try:
        raise CheckpointError("cannot save") from OSError(28, "full")
    except CheckpointError as error:
        assert cli.exit_code_of(error) == 1


def test_a_bug_keeps_its_trace(monkeypatch):
    def fail(_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_verb_with_their_code(number, code):
    script = (
        "import sys, time; import mtnlg.cli.main as cli;"
        "cli._dispatch = lambda _: (print('ready', flush=True), time.sleep(60));"
        "sys.exit(cli.main(['demo']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # job control may ignore it
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "mtnlg", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert b"Traceback" not in done.stderr


def test_our_warnings_are_one_line_and_do_not_outlive_the_verb(monkeypatch, capsys):
    import warnings
    from types import SimpleNamespace

    import mtnlg.api

    def run(_arguments):
        warnings.warn_explicit("stops at 32", UserWarning, mtnlg.api.__file__, 7)
        warnings.warn_explicit("of a library", UserWarning, "/elsewhere/library.py", 7)
        return 0

    module = SimpleNamespace(EXAMPLE="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "_verb_module", lambda verb: module)
    before = warnings.showwarning
    warnings.simplefilter("always")
    assert cli.main(["generate"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["warning: stops at 32", "/elsewhere/library.py:7: UserWarning: of a library"]
    assert warnings.showwarning is before

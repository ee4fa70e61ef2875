"""Ranks that are started, told of signals, and reported when they fail."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.parallel import launch_workers

from mtnlg.config import ConfigError, LayoutConfig
from mtnlg.config.errors import DataError, TrainingError
from mtnlg.parallel import launch, resolve_layout
from mtnlg.parallel.launch import first_node, join_slurm

TWO = LayoutConfig(tensor_parallel_size=2)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def test_one_rank_runs_in_this_process() -> None:
    assert launch(os.getpid, LayoutConfig()) == os.getpid()


def test_ranks_run_with_their_share_of_threads_and_rank_0_answers() -> None:
    assert launch(launch_workers.rank_and_threads, TWO, (5,), num_threads=1) == (0, 1, "2")


def test_what_a_user_caused_on_a_rank_is_raised_as_in_one_process() -> None:
    with pytest.raises(DataError, match=r"^poems\.bin: cut short at byte 12$"):
        launch(launch_workers.misbehave, TWO, ("user",))


def test_rank_that_dies_is_named() -> None:
    with pytest.raises(TrainingError, match="rank 1 died of SIGKILL"):
        launch(launch_workers.misbehave, TWO, ("kill",))


def test_bug_on_a_rank_keeps_its_trace() -> None:
    with pytest.raises(TrainingError, match=r"rank 1 failed(.|\n)*misbehave(.|\n)*an honest mistake"):
        launch(launch_workers.misbehave, TWO, ("bug",))


@posix_only
def test_ctrl_c_reaches_each_rank_once_and_the_ranks_finish(tmp_path: Path) -> None:
    number = signal.SIGINT

    def tell() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    teller = threading.Thread(target=tell)
    teller.start()
    assert launch(launch_workers.stop_when_told, TWO, (str(tmp_path),)) == [number]
    teller.join()
    assert {"saved-0", "saved-1"} <= {path.name for path in tmp_path.iterdir()}
    assert signal.getsignal(number) == before


@posix_only
def test_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    def tell() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    threading.Thread(target=tell).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(launch_workers.do_not_listen, TWO, (str(tmp_path),))
    assert time.monotonic() - begun < 50


def test_open_data_parallel_size_takes_the_ranks_present(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_layout(TWO, "cpu").data_parallel_size == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert resolve_layout(TWO, "cpu").data_parallel_size == 3
    with pytest.raises(ConfigError, match="it must divide the 6 ranks"):
        resolve_layout(LayoutConfig(tensor_parallel_size=4), "cpu")
    with pytest.raises(ConfigError, match=r"8 ranks are asked for .* started 6"):
        resolve_layout(LayoutConfig(tensor_parallel_size=4, data_parallel_size=2), "cpu")


def test_slurm_step_becomes_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "kept")
        monkeypatch.delenv(name)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    join_slurm(batch_script)
    assert "RANK" not in os.environ, "a batch script is no rank, only what srun starts is"
    join_slurm(
        {
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_STEP_NODELIST": "gpu[003-004]",
            "SLURM_JOB_ID": "41",
        }
    )
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    assert found == ["5", "8", "1", "gpu003"]
    assert os.environ["MASTER_PORT"] == "20041"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-007,9],cpu1", "gpu003"), ("a1,a2", "a1"), ("n-1", "n-1"), ("x[7]", "x7")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first

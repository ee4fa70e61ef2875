"""Start, readiness and end: no half-started server, no answer left half said."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from tests.serving.conftest import PATIENCE_SECONDS, eventually

from mtnlg.cli import main as cli
from mtnlg.config.errors import CheckpointError, ConfigError
from mtnlg.config.serving import ServerConfig
from mtnlg.serving.lifecycle import Server
from mtnlg.serving.logs import logging_to
from mtnlg.serving.port import PortError, listen

NAME = "tiny"
BODY = {"model": NAME, "prompt": "the cat", "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    """The tiny model as a Hugging Face folder."""
    from mtnlg import MegatronLmModel

    place = tmp_path_factory.mktemp("models") / NAME
    whole = MegatronLmModel(model.config, tokenizer)
    whole.load_state_dict(model.state_dict())
    whole.save_pretrained(place)
    return place


# -- the start


def test_while_the_model_is_loaded_the_server_says_so():
    go = threading.Event()

    def open_backend():
        assert go.wait(PATIENCE_SECONDS)
        raise CheckpointError("the weights are damaged")

    server = Server(ServerConfig(port=0), open_backend)
    failures = []

    def run():
        try:
            server.run()
        except CheckpointError as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        for answer in (client.post("/v1/completions", json=BODY), client.get("/v1/models")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "model_loading"
            assert "retry-after" in answer.headers
        assert b"mtnlg_ready 0.0" in client.get("/metrics").content
    go.set()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert [str(error) for error in failures] == ["the weights are damaged"]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_a_port_that_is_taken():
    with listen(ServerConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=f"cannot listen on 127.0.0.1:{port}: something listens there"):
            listen(ServerConfig(port=port))


@pytest.mark.parametrize(
    ("host", "words"), [("nowhere.invalid", "no such address"), ("192.0.2.1", "no such address")]
)
def test_a_host_that_is_not_here(host, words):
    with pytest.raises(PortError, match=words):
        listen(ServerConfig(host=host, port=0))


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError) as caught:
        ServerConfig(
            port=70000, max_body_bytes=0, body_timeout_seconds=0, log_format="xml", api_keys=("a b",)
        )
    assert len(caught.value.problems) == 5


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nonsense" * 10)


def damage_config(folder):
    (folder / "config.json").write_text("{")


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def lose_everything(folder):
    for path in folder.iterdir():
        path.unlink()


def nest_config(folder):
    (folder / "config.json").write_text("[" * 100_000)


def misspell_config(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "n_layer": "two"}))


DAMAGES = [damage_weights, damage_config, nest_config, misspell_config, lose_tokenizer, lose_everything]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_read_ends_the_server(folder, tmp_path, damage, capsys):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    assert cli.main(["serve", str(copy), "--port=0"]) == cli.EXIT_USAGE
    error = capsys.readouterr().err
    assert str(copy) in error
    assert "Traceback" not in error


def test_wrong_options_end_before_anything_starts(folder, capsys):
    for words, said in (
        (["--port=99999"], "port is 99999"),
        (["--api-key-file=/nowhere"], "/nowhere cannot be read"),
        (["--max-batch-size=0"], "max_batch_size is 0"),
        (["--persona=a", "--chat-template=b"], "not both"),
    ):
        assert cli.main(["serve", str(folder), "--port=0", *words]) == cli.EXIT_USAGE
        assert said in capsys.readouterr().err


def test_a_missing_library_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mtnlg.serving.lifecycle", None)
    monkeypatch.delitem(sys.modules, "mtnlg.serving.lifecycle")
    monkeypatch.delitem(sys.modules, "mtnlg.serving.app", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", str(folder), "--port=0"]) == cli.EXIT_USAGE
    assert 'pip install "mtnlg[serve]"' in capsys.readouterr().err.replace("'", '"')


# -- the end


def test_running_answers_are_finished_and_new_ones_refused(start):
    with start() as running:
        running.runner.hold()
        with (
            httpx.Client(base_url=running.url, timeout=60) as client,
            httpx.Client(base_url=running.url) as other,
        ):
            answers = []
            whole = threading.Thread(
                target=lambda: answers.append(client.post("/v1/completions", json=BODY))
            )
            whole.start()
            eventually(lambda: running.server.state.num_busy == 1)
            with other.stream(
                "POST", "/v1/completions", json={**BODY, "stream": True}, timeout=60
            ) as stream:
                running.server.stop()
                eventually(lambda: running.get("/ready").status_code == 503)
                assert running.get("/ready").json() == {"status": "draining"}
                assert running.get("/health").status_code == 200
                refused = running.post("/v1/completions", BODY)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                assert running.thread.is_alive()
                running.runner.allow()
                assert stream.read().endswith(b"data: [DONE]\n\n")
            whole.join(PATIENCE_SECONDS)
            assert answers[0].status_code == 200
            assert answers[0].json()["usage"]["completion_tokens"] == 5
        running.thread.join(PATIENCE_SECONDS)
        assert not running.thread.is_alive()


def test_what_takes_too_long_to_finish_is_told_so(start):
    with start(drain_timeout_seconds=0.2) as running:
        running.runner.hold()
        body = {**BODY, "max_tokens": 300}
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as stream:
            running.server.stop()
            eventually(lambda: not running.engine.is_alive)
            running.runner.allow(1)
            frames = stream.read().decode().strip().split("\n\n")
        error = json.loads(frames[-1].removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down"
        running.runner.allow()
        running.thread.join(PATIENCE_SECONDS)
        assert not running.thread.is_alive()


def test_a_second_signal_does_not_wait(start):
    with start(drain_timeout_seconds=600) as running:
        running.runner.hold()
        body = {**BODY, "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as stream:
            for _ in range(2):
                running.server._on_signal()
            eventually(lambda: not running.engine.is_alive)
            running.runner.allow()
            frames = stream.read().decode().strip().split("\n\n")
        assert json.loads(frames[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        running.thread.join(PATIENCE_SECONDS)
        assert not running.thread.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "is_ignored"), [("SIGTERM", False), ("SIGHUP", False), ("SIGHUP", True)]
)
def test_signals_are_heard_unless_nohup_says_otherwise(number, is_ignored):
    number = getattr(signal, number)
    server = Server(ServerConfig(port=0), lambda: None)
    before = signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with server._uvicorn.capture_signals():
            os.kill(os.getpid(), number)
        assert server._num_signals == (not is_ignored)
    finally:
        signal.signal(number, before)
        server._socket.close()


def test_work_that_goes_on_keeps_no_process_alive():
    """A rule that takes minutes to compile must not outlive the server that was asked for it."""
    code = (
        "import time; from mtnlg.serving.workers import Workers; workers = Workers(1, 'slow');"
        "workers.submit(time.sleep, 600); late = workers.submit(print, 'late');"
        "workers.shutdown(); print('over')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "over\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_for_the_log_stops_nobody(start, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)
    full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails as well
    with logging_to(full, "json"), start() as running:
        for _ in range(3):
            assert running.post("/v1/completions", BODY).status_code == 200
    with pytest.raises(OSError):
        full.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_command_serves_and_ends_at_sigterm(folder):
    """A process of its own: ready, an answer, SIGTERM, exit code 0, one JSON line for each event."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MTNLG_API_KEY": "sk-test"}
    words = [sys.executable, "-m", "mtnlg", "serve", str(folder), "--port=0", "--compile=off"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        while not any(line["event"] == "ready" for line in lines):
            lines.append(json.loads(process.stderr.readline()))
        url = lines[-1]["url"]
        headers = {"authorization": "Bearer sk-test"}
        answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=headers, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0 if process.stderr is None else 1]
    finally:
        process.kill()
    assert process.returncode == 0
    events = [line["event"] for line in lines] + [json.loads(line)["event"] for line in rest.splitlines()]
    assert events == ["listening", "ready", "request", "draining", "stopped"]
    assert "the cat" not in rest

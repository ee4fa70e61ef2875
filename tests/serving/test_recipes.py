"""What stands around the server: nginx before it, containers, services. Run where that is possible here."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from tests.serving.running import CHAT, Running

from mtnlg.cli import main as cli
from mtnlg.config.serving import ServerConfig
from mtnlg.serving.lifecycle import CUT_SECONDS

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "serve"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
SECONDS = 40


class Steps:
    """Lets the engine do one step at a time, when a test says so."""

    def __init__(self, engine):
        self.allowed = threading.Semaphore(0)
        self.is_free = False
        self._run, engine.runner.run = engine.runner.run, self.run
        self.num_begun = self.num_done = 0

    def run(self, rows):
        self.num_begun += 1
        if not self.is_free:
            self.allowed.acquire(timeout=6 * SECONDS)  # only so that a failed test ends
        self.num_done += 1
        return self._run(rows)

    def free(self):
        self.is_free = True
        self.allowed.release(1000)


@pytest.fixture
def running():
    with Running(CHAT, request_timeout_seconds=60) as running:
        deadline = time.monotonic() + SECONDS
        while httpx.get(running.server.url + "/ready").status_code != 200:
            assert time.monotonic() < deadline
        yield running


@pytest.fixture
def nginx(running, tmp_path):
    """The recipe's nginx before the server; its address."""
    if NGINX is None:
        pytest.skip("no nginx on this machine: the recipe is not tried (apt-get install nginx)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = (RECIPES / "nginx.conf").read_text()
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
    site = site.replace("127.0.0.1:8000", f"127.0.0.1:{running.server.port}")
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; worker_processes 1;\n"
        f"events {{}} http {{ access_log off; {folders}\n"
        # the server asks for unbuffered streams itself: here the recipe must do it alone
        f"proxy_ignore_headers X-Accel-Buffering;\n{site}\n}}"
    )
    if os.geteuid() == 0:
        config.write_text(f"user root;\n{config.read_text()}")
    command = [NGINX, "-e", "stderr", "-p", str(tmp_path), "-c", str(config)]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(is_so):
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ASK = {
    "model": "tiny",
    "prompt": "hello",
    "max_tokens": 100,
    "ignore_eos": True,
    "stream": True,
    "temperature": 0,
}


def test_nginx_passes_each_token_on_as_it_comes(nginx, running):
    steps = Steps(running.backend.engine)
    num_tokens = 0
    # far longer than a step, and shorter than the pings with which a server keeps a silent stream alive
    patience = SECONDS / 2
    with httpx.stream("POST", f"{nginx}/v1/completions", json=ASK, timeout=patience) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        steps.allowed.release(3)  # the prompt and two more, then the engine stands still
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            num_tokens += 1
            if num_tokens == 2:
                assert steps.num_done <= 3  # it is here, and the rest has not been computed
                steps.free()
    assert num_tokens > 3


def test_a_client_that_leaves_nginx_frees_its_slot(nginx, running):
    engine = running.backend.engine
    steps = Steps(engine)
    with httpx.stream("POST", f"{nginx}/v1/completions", json=ASK, timeout=SECONDS) as response:
        steps.allowed.release(3)
        lines = response.iter_lines()  # an iterator that is forgotten hangs up by itself
        next(line for line in lines if line.startswith("data: {"))
        wait_until(lambda: steps.num_begun == 4)  # and there the engine stands still
        assert engine.statistics.running == 1
    # No token comes meanwhile: the closed connection itself must tell.
    wait_until(lambda: "mtnlg_disconnects_total 1.0" in httpx.get(f"{running.server.url}/metrics").text)
    assert steps.num_done == 3
    steps.allowed.release()
    wait_until(lambda: engine.statistics.running == 0)
    assert steps.num_done == 4
    steps.free()


def test_the_page_and_its_limits_through_nginx(nginx, running):
    steps = Steps(running.backend.engine)
    steps.free()
    assert httpx.get(f"{nginx}/").text.startswith("<!doctype html>")
    assert httpx.get(f"{nginx}/page/app.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{nginx}/metrics").status_code == 200
    big = httpx.post(f"{nginx}/v1/completions", content=b"x" * (ServerConfig().max_body_bytes + 1))
    assert big.status_code == 413
    answer = httpx.post(f"{nginx}/v1/completions", json={**ASK, "stream": False, "max_tokens": 4})
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_nginx_waits_longer_than_the_server():
    text = (RECIPES / "nginx.conf").read_text()
    config = ServerConfig()
    seconds = {name: float(value) for name, value in re.findall(r"(\w+)\s+(\d+)s;", text)}
    assert seconds["proxy_read_timeout"] > config.request_timeout_seconds
    assert seconds["keepalive_timeout"] < config.keep_alive_seconds
    assert int(re.search(r"client_max_body_size (\d+)m;", text).group(1)) * 2**20 == config.max_body_bytes


# -- Kubernetes


def manifests():
    folder = RECIPES / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        path.name for path in folder.glob("*.yaml") if path.stem != "kustomization"
    )
    found = [yaml.safe_load((folder / name).read_text()) for name in listed]
    return {manifest["kind"]: manifest for manifest in found}


def container():
    [found] = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def option(name):
    return next(word.partition("=")[2] for word in container()["args"] if word.startswith(f"--{name}="))


def test_the_manifests_fit_together():
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports
    assert int(option("port")) == ports["http"]
    annotations = found["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) == ports["http"]
    volumes = {volume["name"] for volume in found["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes


def test_the_probes_and_the_metric_are_the_servers(running):
    get = lambda path: httpx.get(running.server.url + path)  # noqa: E731
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert get(container()[name]["httpGet"]["path"]).status_code == 200, name
    path = manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    [rule] = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"\n{rule['pods']['metric']['name']} " in get(path).text


def test_a_pod_has_time_to_finish_its_answers():
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    before = float(container()["lifecycle"]["preStop"]["exec"]["command"][-1])
    needed = before + float(option("drain-timeout")) + CUT_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= needed


@pytest.mark.parametrize("where", ["kubernetes", "docker", "systemd"])
def test_the_commands_are_understood(where):
    if where == "kubernetes":
        words = container()["args"]
    elif where == "docker":
        words = json.loads(
            re.search(r"^CMD (\[.*\])$", (RECIPES / "Dockerfile").read_text(), re.MULTILINE)[1]
        )
    else:
        words = service_command()
    parsed = cli.verb_parser("serve").read(words)
    assert parsed.host in ("0.0.0.0", "127.0.0.1")
    assert parsed.port == 8000


# -- systemd and Docker


def service_command():
    unit = (RECIPES / "mtnlg-serve.service").read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=\S+ serve (.*)$", unit, re.MULTILINE).group(1)
    settings = dict(re.findall(r"^(\w+)=(.*)$", (RECIPES / "serve.env").read_text(), re.MULTILINE))
    settings["CREDENTIALS_DIRECTORY"] = "/run/credentials"
    return re.sub(r"\$\{?(\w+)\}?", lambda found: settings[found[1]], command).split()


def test_the_service_has_time_to_finish_its_answers():
    unit = (RECIPES / "mtnlg-serve.service").read_text()
    command = service_command()
    drain = float(command[command.index("--drain-timeout") + 1])
    assert float(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) > drain + CUT_SECONDS
    assert int(re.search(r"^RestartPreventExitStatus=(\d+)$", unit, re.MULTILINE)[1]) == cli.EXIT_USAGE


def test_systemd_finds_no_fault_and_little_exposure(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd on this machine: the unit is not verified")
    unit = tmp_path / "mtnlg-serve.service"
    text = (RECIPES / "mtnlg-serve.service").read_text()
    unit.write_text(text.replace("/opt/mtnlg/.venv/bin/mtnlg", shutil.which("true")))
    run = lambda *words: subprocess.run(  # noqa: E731
        ["systemd-analyze", *words, str(unit)], capture_output=True, text=True, timeout=SECONDS
    )
    verified = run("verify")
    assert (verified.returncode, verified.stderr) == (0, "")
    security = run("security", "--offline=true")
    if "exposure level" not in security.stdout:
        pytest.skip("this systemd cannot judge a unit that is not running")
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", security.stdout)[1]) < 2


def test_the_example_of_keys_is_a_key_file(tmp_path):
    with Running(CHAT, api_key_file=str(RECIPES / "keys.yaml")) as running:
        wait_until(lambda: httpx.get(running.server.url + "/ready").status_code == 200)
        ask = lambda key: httpx.get(  # noqa: E731
            running.server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}
        )
        assert ask("change-me").status_code == 200
        assert ask("else").status_code == 401


def dockerfile():
    text = (RECIPES / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_takes_what_is_there_and_runs_as_nobody_special():
    lines = dockerfile()
    root = RECIPES.parents[1]
    for word, rest in lines:
        if word == "COPY" and not rest.startswith("--from"):
            assert all((root / name).exists() for name in rest.split()[:-1]), rest
    last = max(n for n, (word, _) in enumerate(lines) if word == "FROM")
    words = [word for word, _ in lines[last:]]
    [user] = [rest for word, rest in lines[last:] if word == "USER"]
    assert user.split(":")[0] != "0" and user != "root"
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert (
        str(manifests()["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]) in user
    )
    arguments = [rest.split("=")[0] for word, rest in lines if word == "ARG"]
    assert {"TORCH_INDEX_URL", "PYTHON_VERSION"} <= set(arguments)


def test_the_health_check_tells_alive_from_dead(running):
    [rest] = [rest for word, rest in dockerfile() if word == "HEALTHCHECK"]
    command = json.loads(rest[rest.index("[") :])
    command = [sys.executable, *command[1:]]

    def check(port):
        words = [word.replace(":8000", f":{port}") for word in command]
        return subprocess.run(words, capture_output=True, timeout=SECONDS).returncode

    assert check(running.server.port) == 0
    assert check(1) != 0


def test_ray_serve_is_given_an_exported_folder():
    [application] = yaml.safe_load((RECIPES / "ray-serve.yaml").read_text())["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    [model] = application["args"]["llm_configs"]
    assert set(model["model_loading_config"]) == {"model_id", "model_source"}

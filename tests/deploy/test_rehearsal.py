"""The rehearsal's own parts: services start in order and stop, failures name the service, panels are asked for real."""

import os
import shutil
import signal
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.adapters.service_processes import ServiceFailedError, ServiceProcesses, started
from benchmarks.board_queries import BoardQuery
from benchmarks.compose_file import ComposeError, read_compose
from benchmarks.compose_rehearsal import NOT_RUN, answers_table, ask, rehearsed_services

ROOT = Path(__file__).parents[2]
SUBNET = f"127.77.{os.getpid() % 250 + 1}"
COMPOSE = """
services:
  files:
    image: python:3.11
    entrypoint: [python, -m, http.server]
    command: ["8000", --bind=0.0.0.0, --directory, /srv]
    volumes: ["./tests/deploy/served:/srv:ro", "state:/state"]
    healthcheck: {test: [CMD, python, -c, "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/', timeout=2)"]}
  after:
    image: python:3.11
    entrypoint: [python, -c]
    command: ["import urllib.request as r, time; r.urlopen('http://files:8000/'); time.sleep(60)"]
    depends_on: {files: {condition: service_healthy}}
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")


@pytest.fixture
def root(tmp_path):
    served = tmp_path / "root" / "tests" / "deploy" / "served"
    served.mkdir(parents=True)
    (served / "peers.txt").write_text("files:8000 after 0.0.0.0\n")
    return tmp_path / "root"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@linux
def test_services_run_at_their_own_addresses_with_their_mounts_and_none_is_left(root, tmp_path):
    with started(read_compose(COMPOSE), root, tmp_path, SUBNET) as processes:
        address = processes.stage.addresses["files"]
        assert httpx.get(f"http://{address}:8000/peers.txt").text == f"{address}:8000 after {address}\n"
        assert (tmp_path / "mounts" / "state").is_dir()
        pids = [running.process.pid for running in processes.running.values()]
        assert processes.stop("after") == -signal.SIGTERM
        assert "after" not in processes.running
    assert not any(map(alive, pids))


@linux
def test_a_service_that_ends_is_named_with_its_log(root, tmp_path):
    text = COMPOSE.replace("--directory, /srv", "--no-such-option")
    with pytest.raises(ServiceFailedError, match=r"(?s)service files ended with status 2: .*--no-such-option"):  # noqa: SIM117
        with started(read_compose(text), root, tmp_path, SUBNET):
            pass


@linux
def test_a_service_that_ignores_sigterm_is_said_and_killed(root, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.adapters.service_processes.STOPPED_WITHIN_S", 0.5)
    text = """
services:
  deaf:
    image: python:3.11
    entrypoint: [python, -c]
    command: ["import signal, time; signal.signal(15, signal.SIG_IGN); open('/state/deaf', 'w'); time.sleep(60)"]
    healthcheck: {test: [CMD, python, -c, "open('/state/deaf')"]}
    volumes: ["state:/state"]
"""
    processes = ServiceProcesses(read_compose(text), root, tmp_path, SUBNET)
    running = processes.start("deaf")
    with pytest.raises(ServiceFailedError, match="service deaf did not stop within"):
        processes.stop("deaf")
    assert not alive(running.process.pid)


def test_an_image_that_is_not_known_here_is_refused(root, tmp_path):
    processes = ServiceProcesses(read_compose("services: {x: {image: 'nginx:1.27'}}"), root, tmp_path, SUBNET)
    with pytest.raises(ComposeError, match=r"services.x.image: what nginx:1.27 starts is not known"):
        processes.start("x")


def test_a_program_that_is_missing_is_named(root, tmp_path):
    text = "services: {x: {image: 'a:1', entrypoint: [no-such-program]}}"
    with pytest.raises(ServiceFailedError, match="no-such-program is not installed here"):
        ServiceProcesses(read_compose(text), root, tmp_path, SUBNET).start("x")


def test_all_services_but_grafana_and_the_gpu_profile_are_rehearsed():
    services = rehearsed_services()
    assert set(services) == {"redis", "cluster", "controller", "gateway", "prometheus"}
    assert {"grafana"} == NOT_RUN
    assert list(services)[-1] == "prometheus"  # after the gateway it waits for


@linux
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_queries_are_asked_of_a_real_prometheus(root, tmp_path):
    (root / "deploy").mkdir()
    (root / "deploy" / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n  - {job_name: self, static_configs: [{targets: ['prometheus:9090']}]}\n"
    )
    text = """
services:
  prometheus:
    image: prom/prometheus:v2.55.1
    command: [--config.file=/etc/p.yml, --storage.tsdb.path=/p, --web.listen-address=0.0.0.0:9090]
    volumes: ["./deploy/prometheus.yml:/etc/p.yml:ro", "p:/p"]
    healthcheck:
      test: [CMD, python, -c, "import urllib.request as r, json;
        a = json.load(r.urlopen('http://127.0.0.1:9090/api/v1/query?query=up')); assert a['data']['result']"]
"""
    with started(read_compose(text), root, tmp_path, SUBNET) as processes:
        url = f"http://{processes.stage.addresses['prometheus']}:9090"
        up, none = ask(url, [BoardQuery("up", "A", "up", True), BoardQuery("none", "A", "no_such_metric", False)])
        assert (up.series, up.value) == (1, 1.0)
        assert not none.shows
        assert answers_table([up, none]).row_count == 2
        assert processes.stop("prometheus") == 0

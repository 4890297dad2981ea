"""Real processes over stub GPUs, killed with clocks locked: afterwards every GPU is back at its default clocks."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from agents import agent_command, started, wait_until
from nvml_stub import DRIVER_NOT_LOADED, UNINITIALIZED

from energy.adapters.agent_client import AgentClient
from energy.gpu import ClockLock, GpuAgentError

TTL_S = 2.0
SLACK_S = 2.0  # a tick is a quarter of the TTL; the rest is for a loaded machine
DEFAULT = [(0, 0)] * 4
SLOW = [(990, 990)] * 4

CONTROLLER = """
import sys, time
from energy.adapters.agent_client import AgentClient
from energy.gpu import ClockLock
agent = AgentClient(sys.argv[1], "controller")
agent.lock((0, 1, 2, 3), ClockLock(990, 990))
print("locked", flush=True)
while True:
    time.sleep(0.1)
    assert agent.renew() == ()
"""


@pytest.fixture
def command(machine, tmp_path):
    return agent_command(machine, tmp_path, "--socket", str(tmp_path / "agent.sock"))


def test_kill_minus_9_of_the_controller(machine, command):
    with started([*command, "--ttl", str(TTL_S)], machine) as (_, address):
        controller = subprocess.Popen([sys.executable, "-c", CONTROLLER, address], stdout=subprocess.PIPE, text=True)
        try:
            assert controller.stdout.readline() == "locked\n"
            assert machine.locks == SLOW
            time.sleep(1.25 * TTL_S)  # longer than a lease: renewing is what keeps the locks
            assert machine.locks == SLOW
        finally:
            controller.kill()
            controller.wait()
            controller.stdout.close()
        wait_until(lambda: machine.locks == DEFAULT, TTL_S + SLACK_S)


def test_kill_minus_9_of_the_agent(machine, command):
    with started(command, machine) as (process, address):
        client = AgentClient(address, "controller")
        client.lock((0, 1, 2, 3), ClockLock(990, 990))
        process.kill()
        process.wait()
        assert machine.locks == SLOW, "a lock outlives the process that set it"
        with pytest.raises(GpuAgentError):
            client.renew()
    with started(command, machine), client:
        assert machine.locks == DEFAULT, "reset before the first request is answered"
        assert client.renew() == (0, 1, 2, 3), "and the controller learns that it has to lock again"
        client.lock((2,), ClockLock(990, 990))
        assert machine.locks[2] == (990, 990)


def test_kill_minus_9_of_the_agent_and_what_systemd_runs_after_it(machine, command):
    with started(command, machine) as (process, address), AgentClient(address, "controller") as client:
        client.lock((1, 2), ClockLock(990, 990))
        refused = subprocess.run([*command, "--restore"], env=machine.environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "another agent is running" in refused.stderr
        assert machine.locks[1] == (990, 990)
        process.kill()
        process.wait()
    after = subprocess.run([*command, "--restore"], env=machine.environment, capture_output=True, text=True, check=True)
    assert after.stdout == "2 GPU(s) reset to default clocks\n"
    assert machine.locks == DEFAULT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_resets_first(machine, command, number):
    with started(command, machine) as (process, address), AgentClient(address, "controller") as client:
        client.lock((0, 3), ClockLock(990, 990))
        process.send_signal(number)
        process.wait(timeout=10.0)
        assert machine.locks == DEFAULT


def test_kill_minus_9_of_both(machine, command):
    with started(command, machine) as (process, address):
        with AgentClient(address, "controller") as client:
            client.lock((0, 1, 2, 3), ClockLock(990, 990))
        process.kill()
        process.wait()
    with started(command, machine) as (_, address), AgentClient(address, "controller") as client:
        assert machine.locks == DEFAULT
        assert client.renew() == ()
        client.lock((0,), ClockLock(990, 990))  # and serves again
        assert machine.locks == [(990, 990), *DEFAULT[1:]]


def test_a_driver_that_goes_away_ends_the_agent_and_the_next_finds_the_orphans(machine, command):
    with started(command, machine) as (process, address), AgentClient(address, "controller") as client:
        client.lock((0, 1), ClockLock(990, 990))
        for gpu in machine.gpus:
            gpu.read_error = gpu.write_error = UNINITIALIZED
        process.wait(timeout=10.0)
        assert machine.locks[:2] == SLOW[:2], "nothing could be reset"
    for gpu in machine.gpus:
        gpu.read_error = gpu.write_error = 0
    with started(command, machine):
        assert machine.locks == DEFAULT


def test_without_a_driver_it_says_so_and_does_not_start(machine, command):
    machine.state.init_error = DRIVER_NOT_LOADED
    refused = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("dynamollm: NVML: init: the NVIDIA kernel driver is not loaded")


def test_systemd_is_told_when_it_serves_and_that_it_lives(machine, command, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify.sock"))
        notified.settimeout(10.0)
        machine.extra_environment["NOTIFY_SOCKET"] = str(tmp_path / "notify.sock")
        with started(command, machine):
            assert [notified.recv(100) for _ in range(3)] == [b"READY=1\nWATCHDOG=1"] * 3

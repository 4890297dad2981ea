"""The emulated ``vllm`` command: vLLM's own words start it, boards set its clock, SIGTERM drains it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from energy.gpu import ClockLock
from energy.gpus import GPUS
from energy.profile import ProfileError
from pools.drivers.port import InstanceSpec
from pools.drivers.vllm_launch import VllmLaunch, VllmModel, command_line, environment
from pools.instances import GpuSlot, InstanceShape
from simulator.emulator.adapters.vllm_command import parse
from simulator.vllm_device.adapters.gpus import BoardNode

PROFILE = "llama-3.1-8b-bf16-h100"
SPEC = InstanceSpec("i-1", "SS", InstanceShape("tiny", "H100-SXM", 2), (GpuSlot("n", 2), GpuSlot("n", 3)), 1200)
LAUNCH = VllmLaunch(command=(sys.executable, "-m", "simulator.emulator.adapters.vllm_command"))
MODEL = VllmModel("/models/tiny", ("--max-model-len", "4096", "--emulated-startup-s", "0.1"))


def variables(boards: Path | None = None) -> dict[str, str]:
    told = {"EMULATED_DEVICE_PROFILE": PROFILE} | ({"EMULATED_DEVICE_BOARDS": str(boards)} if boards else {})
    return environment(LAUNCH, MODEL, SPEC, "controller", {**os.environ, **told})


def test_the_words_a_driver_gives_vllm_are_understood():
    words = command_line(LAUNCH, MODEL, SPEC, 8123)[len(LAUNCH.command) :]
    launch = parse(words, variables(Path("/boards")))
    options = launch.request.options
    assert (options.id, options.model, options.tp, options.gpus, options.port) == ("i-1", "tiny", 2, (2, 3), 8123)
    assert (options.max_model_len, options.startup_s, options.host) == (4096, 0.1, "127.0.0.1")
    assert launch.node.gpu == "H100-SXM"
    assert [path.name for path in launch.boards] == ["n-2.board", "n-3.board"]
    assert launch.grace_s > 3600


def test_outside_of_a_driver_it_takes_the_first_gpus_and_the_models_name():
    options = parse(["serve", "org/model", "-tp", "4", "--emulated-profile", PROFILE], {}).request.options
    assert (options.model, options.gpus, options.host) == ("org/model", (0, 1, 2, 3), "0.0.0.0")


def test_what_it_cannot_do_without_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["serve", "m"], {})
    assert "--emulated-profile" in capsys.readouterr().err
    with pytest.raises(ProfileError, match="nowhere"):
        parse(["serve", "m", "--emulated-profile", "nowhere"], {})


def until(what, within_s: float = 20.0) -> None:
    for _ in range(int(within_s / 0.05)):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_it_serves_at_the_clock_of_its_boards_and_keeps_their_meters(tmp_path):
    node = BoardNode("n", 4, GPUS["H100-SXM"], tmp_path / "boards")
    board = node.gpus()[2]
    words = command_line(LAUNCH, MODEL, SPEC, 21307)
    process = subprocess.Popen(words, env=variables(tmp_path / "boards"), stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url="http://127.0.0.1:21307", trust_env=False, timeout=20.0) as client:
            until(lambda: answers(client))
            body = {"model": "tiny", "prompt": "long " * 2400, "max_tokens": 2, "ignore_eos": True}

            def completion_s() -> float:
                began_s = time.monotonic()
                assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2
                return time.monotonic() - began_s

            bare_w = GPUS["H100-SXM"].bare_w
            until(lambda: board.power_w() > bare_w)  # loaded: it is written by the engine
            fast_s = min(completion_s() for _ in range(3))
            before_j = board.energy_j()
            for gpu in node.gpus()[2:]:
                gpu.lock_sm_clocks(ClockLock(345, 345))
            time.sleep(0.2)
            assert min(completion_s() for _ in range(3)) > 1.5 * fast_s
            assert board.energy_j() > before_j
            assert node.gpus()[0].power_w() == pytest.approx(bare_w, rel=1e-3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        node.close()

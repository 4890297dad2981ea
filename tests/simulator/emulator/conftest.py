"""An emulator within the test process: real sockets, its event loop in a thread, steps of half a millisecond."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import httpx
import pytest
import uvloop

from energy.adapters.catalogue import load_fitted, save_fitted
from simulator.emulator.adapters.process import EmulatorProcess, NodeOptions, ProcessOptions

MODEL = "tiny"
SPEED = 50.0  # how many times faster than the shipped profile


class EmulatorUnderTest:
    """Starts and stops instances through the control endpoint, as the driver does."""

    def __init__(self, process: EmulatorProcess, profile: str) -> None:
        self.process = process
        self.profile = profile
        self.control = httpx.Client(base_url=process.control_url, timeout=10)
        self.agent = httpx.Client(base_url=process.agent_urls["node-0"], timeout=10)
        self._ids = (f"i-{number}" for number in count())

    def ask(self, profile: str | None = None, tokenizer_file: str | None = None, **options) -> httpx.Response:
        """POST /instances."""
        gpus = options.pop("gpus", [0, 1])
        given = {"id": next(self._ids), "model": MODEL, "tp": len(gpus), "node": "node-0", "gpus": gpus, **options}
        body = {"profile": profile or self.profile, "tokenizer_file": tokenizer_file, "options": given}
        return self.control.post("/instances", json=body)

    def start(self, **options) -> "InstanceUnderTest":
        """Start an instance and wait until it is ready."""
        answer = self.ask(**{"max_model_len": 4096, "wake_s": 0.0, **options})
        assert answer.status_code == 201, answer.text
        instance = InstanceUnderTest(self, answer.json())
        instance.await_state("ready")
        return instance

    def stop_all(self) -> None:
        for instance in self.control.get("/instances").json():
            self.control.delete(f"/instances/{instance['id']}")


class InstanceUnderTest:
    """One emulated vLLM server and clients to it."""

    def __init__(self, emulator: EmulatorUnderTest, described: dict) -> None:
        self.emulator = emulator
        self.id = described["id"]
        self.url = described["url"]
        self.described = described
        self.http = httpx.Client(base_url=self.url, timeout=10)

    def state(self) -> dict | None:
        every = self.emulator.control.get("/instances").json()
        return next((instance for instance in every if instance["id"] == self.id), None)

    def await_state(self, state: str) -> None:
        with self.emulator.control.stream("GET", "/events") as events:
            for line in events.iter_lines():
                if f'"id":"{self.id}","state":"{state}"' in line:
                    return
        raise AssertionError("the emulator ended")

    def change(self, what: str, **body) -> dict:
        answer = self.emulator.control.post(f"/instances/{self.id}/{what}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, grace_s: float = 0.0) -> None:
        self.emulator.control.delete(f"/instances/{self.id}", params={"grace_s": grace_s})

    def chat(self, **fields) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=chat_body(**fields))

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def chat_body(**fields) -> dict:
    messages = [{"role": "user", "content": "Hello there"}]
    return {"model": MODEL, "messages": messages, "ignore_eos": True, "max_tokens": 4, **fields}


@pytest.fixture(scope="session")
def fast_profile(tmp_path_factory) -> str:
    """The shipped 70B profile with every time divided by ``SPEED``."""
    fitted = load_fitted("llama-3.1-70b-fp8-h100")
    keep = {"sharpness"}
    times = {
        tp: replace(t, **{f: getattr(t, f) / SPEED for f in t.__slots__ if f not in keep})
        for tp, t in fitted.times.items()
    }
    path = tmp_path_factory.mktemp("profiles") / "fast.yaml"
    save_fitted(replace(fitted, name="fast", times=times), path)
    return str(path)


@pytest.fixture(scope="session")
def running_emulator(fast_profile) -> Iterator[EmulatorUnderTest]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> EmulatorProcess:
        process = EmulatorProcess(ProcessOptions([NodeOptions("node-0"), NodeOptions("node-1")]))
        await process.listen()
        return process

    process = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    yield EmulatorUnderTest(process, fast_profile)
    asyncio.run_coroutine_threadsafe(process.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def emulator(running_emulator) -> Iterator[EmulatorUnderTest]:
    """An emulator without instances and with reset clocks."""
    yield running_emulator
    running_emulator.stop_all()
    running_emulator.agent.post("/gpu/reset_gpu_locked_clocks", params={"gpu_ids": "0,1,2,3,4,5,6,7", "block": "true"})


@pytest.fixture
def instance(emulator) -> InstanceUnderTest:
    return emulator.start()

"""A real vLLM server whose device is emulated: its steps last, and its boards draw, what the profile says."""

import asyncio
import statistics
import time
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from conftest import ENVIRONMENT
from vllm_cluster import START_S

from dynamollm.settings import DriverSettings, ModelSettings, NodeSettings, PoolSettings, Settings, VllmSettings
from dynamollm.vllm_wiring import build_emulated_device_driver
from energy.adapters.catalogue import load_profile
from energy.profile import GpuState, step_time_s
from pools.drivers.port import InstanceSpec
from pools.instances import GpuSlot, InstanceShape, InstanceState

NAME = "llama-3.1-70b-fp8-h100"
PROFILE = load_profile(NAME)
TP, TOKENS, PROMPT_WORDS, LONG_PROMPT = 2, 60, 50, 1500
GPUS = tuple(GpuSlot("node", index) for index in range(TP))
HOST_S = 0.005  # what a quiet host may add to a step's end: it polls nothing, but other processes have their turns


def settings(log_dir: Path) -> Settings:
    environment = Path(ENVIRONMENT).resolve()
    vllm = VllmSettings(command=str(environment / "bin" / "vllm"), log_dir=str(log_dir))
    return Settings(
        models=(ModelSettings("m", NAME, path=str(environment / "model-nano"), max_model_len=32_768),),
        nodes=(NodeSettings("node"),),
        pools=(PoolSettings("LL", "m", "LL", TP),),
        driver=DriverSettings("vllm-emulated", vllm=vllm),
    )


async def gaps_s(url: str) -> list[float]:
    """Times between the tokens of one stream that has the engine to itself."""
    body = {"model": "m", "prompt": "time " * PROMPT_WORDS, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    seen_s = []
    async with (
        httpx.AsyncClient(timeout=120, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                seen_s.append(time.monotonic())
    assert len(seen_s) > TOKENS // 2
    return [after - before for before, after in pairwise(seen_s)]


async def prefill_s(url: str, token: int) -> float:
    """Time to read a long prompt of one token over and over, which no other call has cached."""
    body = {"model": "m", "prompt": [token] * LONG_PROMPT, "max_tokens": 1, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        began_s = time.monotonic()
        answer = await client.post(f"{url}/v1/completions", json=body)
        assert answer.json()["usage"]["prompt_tokens"] == LONG_PROMPT
        return time.monotonic() - began_s


def expected_prefill_s(clock_mhz: int) -> float:
    return step_time_s(PROFILE.step(TP, clock_mhz), LONG_PROMPT, LONG_PROMPT**2 / 2, 0, 0)


def expected_s(clock_mhz: int) -> float:
    return step_time_s(PROFILE.step(TP, clock_mhz), 0, 0, 1, PROMPT_WORDS + TOKENS / 2)


async def play(log_dir: Path) -> None:
    driver = build_emulated_device_driver(settings(log_dir))
    boards = driver._clocks._nodes["node"].gpus()
    try:
        events = driver.events()
        spec = InstanceSpec("emulated-1", "LL", InstanceShape("m", "H100-SXM", TP), GPUS, 1980)
        instance = await driver.start(spec)
        async for event in events:
            assert event.state is not InstanceState.FAILED, event.reason
            if event.state is InstanceState.READY:
                break

        medians_s, prefills_s = {}, {}
        for clock_mhz in (1980, 1005):
            assert await driver.set_sm_clock("emulated-1", clock_mhz) == clock_mhz
            before_j, before_s = boards[0].energy_j(), time.monotonic()
            gaps = await gaps_s(instance.url)
            power_w = (boards[0].energy_j() - before_j) / (time.monotonic() - before_s)
            medians_s[clock_mhz] = statistics.median(gaps)
            prefills_s[clock_mhz] = min([await prefill_s(instance.url, clock_mhz + try_) for try_ in range(3)])
            assert PROFILE.idle_power_w(GpuState.LOADED, clock_mhz) < power_w <= 700.0
            assert boards[TP].power_w() < boards[0].power_w()  # of no engine: bare
            print(
                f"{clock_mhz} MHz: profile {expected_s(clock_mhz):.4f} s, median {medians_s[clock_mhz]:.4f} s, "
                f"mean {statistics.mean(gaps):.4f} s; {power_w:.0f} W"
            )
        for clock_mhz, median_s in medians_s.items():
            assert 0.95 * expected_s(clock_mhz) <= median_s <= expected_s(clock_mhz) + HOST_S
        for clock_mhz, took_s in prefills_s.items():  # compute-bound, so this is where the clock is felt
            assert 0.95 * expected_prefill_s(clock_mhz) <= took_s <= expected_prefill_s(clock_mhz) + 10 * HOST_S
        print(f"prefill of {LONG_PROMPT}: {prefills_s}")
        assert prefills_s[1005] > 1.5 * prefills_s[1980]

        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            page = (await client.get(f"{instance.url}/metrics")).text
        blocks, size = (int(page.split(f'{key}="')[1].split('"')[0]) for key in ("num_gpu_blocks", "block_size"))
        assert blocks * size == pytest.approx(PROFILE.kv_capacity_tokens(TP), rel=0.01)  # the emulated GPUs' memory

        await driver.park("emulated-1")
        (parked,) = await driver.list()
        assert (parked.state, parked.sm_clock_mhz) == (InstanceState.PARKED, 345)
        await driver.wake("emulated-1")
        assert len(await gaps_s(instance.url)) > TOKENS // 2
        await driver.stop("emulated-1", 10.0)
        assert boards[0].locked_sm_clocks_mhz() is None
        assert boards[0]._board.read_meter().idle_w == boards[TP]._board.read_meter().idle_w  # bare again
    finally:
        await driver.close()


def test_a_real_server_keeps_an_emulated_devices_time_and_energy(tmp_path):
    async def bounded():
        async with asyncio.timeout(START_S):
            await play(tmp_path)

    asyncio.run(bounded())

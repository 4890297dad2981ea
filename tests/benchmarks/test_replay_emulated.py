"""The replay against an emulated vLLM instance, end to end over sockets in real time."""

import asyncio

import numpy as np
import pytest

from benchmarks.adapters.http_streams import Target
from benchmarks.adapters.replay_run import ReplayOrder, run_replay
from simulator.emulator.adapters.control import InstanceRequest
from simulator.emulator.adapters.instance import InstanceOptions
from simulator.emulator.adapters.process import EmulatorProcess, NodeOptions, ProcessOptions
from simulator.workload.arrivals import Arrivals

REQUESTS = 24


def arrivals() -> Arrivals:
    rng = np.random.default_rng(0)
    times = np.sort(rng.random(REQUESTS)) * 1.5
    return Arrivals(
        times, rng.integers(40, 1500, REQUESTS).astype(np.int32), rng.integers(1, 25, REQUESTS).astype(np.int32)
    )


async def replayed(chat: bool):
    process = EmulatorProcess(ProcessOptions([NodeOptions("node-0", "H100-SXM", 8)], "127.0.0.1", 0, 0.0))
    await process.listen()
    try:
        options = InstanceOptions(
            id="i0", model="tiny", tp=2, node="node-0", gpus=(0, 1), host="127.0.0.1", port=0, startup_s=0.0
        )
        instance = process.control.create(InstanceRequest(options, "llama-3.1-70b-fp8-h100", None))
        telemetry = f"{process.agent_urls['node-0']}/metrics"
        target = Target.of(instance.url)
        return await run_replay(ReplayOrder("t", arrivals(), target, chat=chat, gpu_telemetry=telemetry))
    finally:
        await process.close(0.0)


@pytest.mark.parametrize("chat", [True, False])
def test_an_emulated_instance_is_replayed_against(chat):
    report = asyncio.run(replayed(chat))
    assert report.model == "tiny"
    assert report.accounted
    assert report.total.finished == REQUESTS
    assert report.failures == {}
    assert report.input_token_error.max <= 1
    assert report.other_output_length == 0
    assert report.total.output_tokens == int(arrivals().output_tokens.sum())
    assert report.total.ttft_s.p50 > 0.01  # the profile's time, not the socket's
    assert report.total.tbt_s.p50 > 0.008
    # eight GPUs at rest draw far more than 30 W each, and never more than 700 W
    assert 8 * 30 * report.wall_s < report.gpu_energy_j < 8 * 700 * (report.wall_s + 1)

"""One emulated server under the ``vllm`` command's own words: ``python -m MODULE serve MODEL ...``.

For drivers that start engines by a command line (Ray, Kubernetes): the same words start the real server. It takes
vLLM's flags, uses those that an emulated engine has, and passes over the rest. Its GPUs are the indices of
``CUDA_VISIBLE_DEVICES``; where ``EMULATED_DEVICE_BOARDS`` names a folder of boards, it runs at the clocks locked there
and keeps their meters. SIGTERM drains it, for at most ``--shutdown-timeout`` seconds.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from energy.adapters.catalogue import load_profile
from energy.profile import ProfileError
from simulator.emulator.adapters.control import InstanceRequest, RefusedError
from simulator.emulator.adapters.instance import DEFAULT_LIMITS, EmulatedInstance, InstanceOptions
from simulator.emulator.adapters.process import EmulatorProcess, NodeOptions, ProcessOptions
from simulator.vllm_device.adapters.board import BoardFile, Meter, board_path
from simulator.vllm_device.adapters.device import BOARDS, PROFILE

CLOCK_POLL_S = 0.02
METER_PERIOD_S = 0.25


@dataclass(frozen=True, slots=True)
class Launch:
    """What the command line and the environment say."""

    request: InstanceRequest
    node: NodeOptions
    grace_s: float
    boards: tuple[Path, ...] = ()


def parse(words: Sequence[str], environ: Mapping[str, str]) -> Launch:
    """Read a ``vllm`` command line. Exits as argparse does; raises ``ProfileError``."""
    parser = argparse.ArgumentParser(prog="vllm", description=__doc__)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model", help="taken for the served name where none is given; nothing is loaded from there")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--max-model-len", type=int, default=131_072)
    parser.add_argument("--max-num-seqs", type=int, default=DEFAULT_LIMITS.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=DEFAULT_LIMITS.max_num_batched_tokens)
    parser.add_argument("--api-key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulated-profile", help="energy profile: name or file (not a flag of vLLM's)")
    parser.add_argument("--emulated-startup-s", type=float, default=0.0, help="time to load weights")
    given, _ = parser.parse_known_args(words)
    profile = given.emulated_profile or environ.get(PROFILE)
    if profile is None:
        parser.error(f"--emulated-profile is needed, or {PROFILE} in the environment")
    tp = given.tensor_parallel_size
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(int(index) for index in visible.split(",")) if visible else tuple(range(tp))
    node = environ.get("DYNAMOLLM_NODE", "node-0")
    options = InstanceOptions(
        id=environ.get("DYNAMOLLM_INSTANCE", "instance-0"),
        model=given.served_model_name or given.model,
        tp=tp,
        node=node,
        gpus=gpus,
        host=given.host,
        port=given.port,
        startup_s=given.emulated_startup_s,
        max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        api_key=given.api_key,
        seed=given.seed,
    )
    folder = environ.get(BOARDS)
    boards = tuple(board_path(Path(folder), node, index) for index in gpus) if folder else ()
    return Launch(
        InstanceRequest(options, profile),
        NodeOptions(node, load_profile(profile).gpu, max(gpus) + 1),
        given.shutdown_timeout,
        boards,
    )


async def serve(launch: Launch) -> None:
    """Run until SIGTERM. Raises ``RefusedError``, ``OSError``."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    process = EmulatorProcess(ProcessOptions([launch.node]))  # its control endpoint is not needed, and not opened
    instance = process.control.create(launch.request)
    following = loop.create_task(_follow(instance, [BoardFile(path) for path in launch.boards]))
    print(f"emulated {launch.request.options.model} at {instance.url}", flush=True)
    await ended.wait()
    await process.close(launch.grace_s)
    following.cancel()


async def _follow(instance: EmulatedInstance, boards: Sequence[BoardFile]) -> None:
    """Run at the clocks locked on the boards, and keep their meters, which count on from what they read before."""
    loop = asyncio.get_running_loop()
    locks: list[tuple[int, int] | None] = [None] * len(boards)
    began_j = [board.read_meter().energy_at_j(time.monotonic()) for board in boards]
    metered_s = float("-inf")
    while boards:
        for index, (board, gpu) in enumerate(zip(boards, instance.gpus, strict=True)):
            if board.lock_mhz != locks[index]:
                locks[index] = board.lock_mhz
                gpu.lock(board.lock_mhz[1] if board.lock_mhz else None)
        if (now_s := time.monotonic()) - metered_s >= METER_PERIOD_S:
            metered_s = now_s
            for board, gpu, since_j in zip(boards, instance.gpus, began_j, strict=True):
                energy_j, power_w = since_j + gpu.energy_mj(loop.time()) / 1000.0, gpu.power_w(loop.time())
                board.write_meter(Meter(now_s, energy_j, now_s, now_s, 0.0, power_w, os.getpid()))
        await asyncio.sleep(CLOCK_POLL_S)


def main() -> None:
    """Parse the command line and serve."""
    try:
        uvloop.run(serve(parse(sys.argv[1:], os.environ)))
    except (ProfileError, RefusedError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

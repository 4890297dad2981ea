"""``dynamollm emulate``: emulated vLLM instances without a gateway, for experiments with one's own router or client."""

import asyncio
import signal
from contextlib import suppress

import click
import uvloop

from dynamollm.errors import UserError
from energy.adapters.catalogue import load_profile, profile_names
from energy.profile import EnergyProfile, ProfileError
from simulator.emulator.adapters.control import InstanceRequest, RefusedError
from simulator.emulator.adapters.instance import DEFAULT_LIMITS, EmulatedInstance, InstanceOptions
from simulator.emulator.adapters.process import EmulatorProcess, NodeOptions, ProcessOptions

GPUS_PER_NODE = 8


def place(instances: int, tp: int) -> list[tuple[str, tuple[int, ...]]]:
    """Node and GPUs of each instance: as many on a node of eight as fit."""
    per_node = GPUS_PER_NODE // tp
    return [
        (f"node-{number // per_node}", tuple(range(number % per_node * tp, (number % per_node + 1) * tp)))
        for number in range(instances)
    ]


@click.command()
@click.option("--instances", default=1, show_default=True, type=click.IntRange(1, 512), help="How many servers.")
@click.option(
    "--node",
    "nodes",
    multiple=True,
    metavar="NAME=COUNTxGPU",
    help="A machine for a controller to fill (its driver.emulators), as h100-0=8xH100-SXM; then no server is started.",
)
@click.option("--tp", default="2", show_default=True, type=click.Choice(["1", "2", "4", "8"]), help="GPUs of each.")
@click.option("--profile", default="llama-3.1-70b-fp8-h100", show_default=True, help="Energy profile: name or file.")
@click.option("--model", help="Served model name.  [default: the profile's]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=9100,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port of the first instance; the others follow. 0: any.",
)
@click.option("--control-port", default=0, help="Port of the control endpoint.  [default: any]")
@click.option("--sm-clock", type=click.IntRange(100, 5000), help="SM clock in MHz.  [default: the maximum]")
@click.option("--tokenizer", "tokenizer_file", type=click.Path(exists=True, dir_okay=False), help="A tokenizer.json.")
@click.option("--max-model-len", default=131_072, show_default=True, type=click.IntRange(1), help="Tokens of context.")
@click.option(
    "--max-num-seqs",
    default=DEFAULT_LIMITS.max_num_seqs,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences of a batch.",
)
@click.option("--max-num-queued-reqs", type=click.IntRange(0), help="Answer 503 beyond so many requests.")
@click.option("--startup-s", default=0.0, show_default=True, help="Time an instance takes to load.")
@click.option("--shutdown-timeout", default=0.0, show_default=True, help="Seconds for running requests on Ctrl-C.")
@click.option("--seed", default=0, show_default=True, help="Seed of texts and lengths.")
def command(
    instances: int,
    nodes: tuple[str, ...],
    tp: str,
    profile: str,
    model: str | None,
    host: str,
    port: int,
    control_port: int,
    sm_clock: int | None,
    tokenizer_file: str | None,
    max_model_len: int,
    max_num_seqs: int,
    max_num_queued_reqs: int | None,
    startup_s: float,
    shutdown_timeout: float,
    seed: int,
) -> None:
    """Run emulated vLLM instances until Ctrl-C.

    Each listens on a port of its own and answers as vLLM does, at the pace of the profile. Their GPUs are emulated too:
    each node exports DCGM metrics and takes clocks under zeusd's paths.
    """
    if nodes:
        machines = [_machine(text) for text in nodes]
        _run(ProcessOptions(machines, host, control_port, shutdown_timeout), [])
        return
    gpus_each = int(tp)
    loaded = _profile(profile, gpus_each)
    requests = [
        InstanceRequest(
            InstanceOptions(
                id=f"instance-{number}",
                model=model or loaded.model,
                tp=gpus_each,
                node=node,
                gpus=gpus,
                sm_clock_mhz=sm_clock,
                host=host,
                port=port + number if port else 0,
                startup_s=startup_s,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_queued_reqs=max_num_queued_reqs,
                seed=seed,
            ),
            profile,
            tokenizer_file,
        )
        for number, (node, gpus) in enumerate(place(instances, gpus_each))
    ]
    names = dict.fromkeys(request.options.node for request in requests)
    options = ProcessOptions(
        [NodeOptions(name, loaded.gpu, GPUS_PER_NODE) for name in names], host, control_port, shutdown_timeout
    )
    _run(options, requests)


def _machine(text: str) -> NodeOptions:
    name, _, rest = text.partition("=")
    gpus, _, gpu = rest.partition("x")
    if not (name and gpus.isdigit() and gpu):
        raise UserError(f"--node: {text!r} is not NAME=COUNTxGPU, as h100-0=8xH100-SXM")
    return NodeOptions(name, gpu, int(gpus))


def _run(options: ProcessOptions, requests: list[InstanceRequest]) -> None:
    host = options.host
    try:
        uvloop.run(_serve(options, requests))
    except ProfileError as error:
        raise UserError(f"--node: {error}") from None
    except RefusedError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}: {error.strerror}; choose other ports (--port, --control-port)"
        ) from None


def _profile(name: str, tp: int) -> EnergyProfile:
    try:
        loaded = load_profile(name)
    except ProfileError as error:
        raise UserError(f"--profile: {error}") from None
    if tp not in loaded.tensor_parallel:
        held = ", ".join(map(str, loaded.tensor_parallel))
        raise UserError(f"--tp: profile {loaded.name} holds for TP {held}, not {tp}; shipped: {profile_names()}")
    return loaded


async def _serve(options: ProcessOptions, requests: list[InstanceRequest]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, ended.set)
    process = EmulatorProcess(options)
    await process.listen()
    try:
        started = [process.control.create(request) for request in requests]
        _show(process, started)
        await ended.wait()
    finally:
        await process.close(options.shutdown_timeout_s)


def _show(process: EmulatorProcess, started: list[EmulatedInstance]) -> None:
    """Plain lines: addresses are there to be copied, and to be read by scripts."""
    of = f" of {started[0].options.model}" if started else ""
    click.echo(f"{len(started)} emulated instances{of}, Ctrl-C ends them")
    for instance in started:
        gpus = ",".join(map(str, instance.options.gpus))
        where = f"{instance.options.node} GPUs {gpus} at {instance.sm_clock_mhz} MHz"
        click.echo(f"  {instance.id:<13} {instance.url}/v1   {where}   context {instance.rules.max_model_len} tokens")
    for node, url in process.agent_urls.items():
        click.echo(f"  {node:<13} {url}/metrics (DCGM names)   {url}/gpu/... (clocks and energy, as zeusd)")
    click.echo(f"  {'control':<13} {process.control_url}")

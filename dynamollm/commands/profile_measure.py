"""``dynamollm profile measure``: sweep loads over a served instance into the CSV that profiles are fitted to."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dynamollm.errors import UserError


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers separated by commas") from None
    if any(number <= 0 for number in numbers):
        raise click.BadParameter("all must be above 0")
    return numbers


def _indices(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r} is not GPU indices separated by commas")
    return [int(part) for part in parts]


def _lengths(context: click.Context, parameter: click.Parameter, text: str) -> list[tuple[int, int]]:
    lengths = []
    for part in text.split(","):
        first, _, second = part.strip().partition("+")
        if not (first.isdigit() and second.isdigit() and int(first) > 0 and int(second) > 1):
            raise click.BadParameter(f"{part.strip()!r} is not INPUT+OUTPUT in tokens, as 128+64, with 2 or more out")
        lengths.append((int(first), int(second)))
    return lengths


_Command = TypeVar("_Command", bound=Callable[..., object])


def _list(name: str, default: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(name, default=default, show_default=True, callback=_numbers, metavar="N,N,...", help=text)


@click.command()
@click.option("--url", required=True, help="Base URL of one vLLM server (not of a gateway over several).")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write.")
@click.option("--gpu", required=True, help="Its GPU, as H100-SXM; names of your own are fitted without figures.")
@click.option("--model", help="The model's name in the CSV.  [default: as the server lists it]")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1, 16), help="GPUs of the server.")
@click.option("--precision", default="bf16", show_default=True, help="Of the weights, as noted in the CSV.")
@click.option(
    "--lengths",
    default="128+128,512+128,2048+128,512+512",
    show_default=True,
    callback=_lengths,
    metavar="IN+OUT,...",
    help="Input and output tokens.",
)
@_list("--concurrency", "1,2,4,8,16,32,64", "Clients of closed loops; each sends 10 requests one after the other.")
@_list("--rate", "", "Requests/s of open loops.")
@_list("--sm-clocks", "", "Clocks to lock, in MHz, one after the other; needs --agent. Else give the one it runs at.")
@click.option("--agent", help="Node agent that sets the clocks: unix:/path or http://host:port.")
@click.option(
    "--gpu-indices", default="0", show_default=True, callback=_indices, help="The server's GPUs at the agent."
)
@click.option("--gpu-telemetry", metavar="URL", help="DCGM metrics of the server's GPUs and no others: for power.")
@click.option("--open-duration", "open_s", default=60.0, show_default=True, type=click.FloatRange(min=1), help="In s.")
@click.option("--seed", default=0, show_default=True, help="Of the open loops' arrivals.")
@click.option("--fit", "profile", type=click.Path(path_type=Path, dir_okay=False), help="Then fit this profile to it.")
@click.pass_context
def measure(
    context: click.Context,
    url: str,
    output: Path,
    gpu: str,
    model: str | None,
    tp: int,
    precision: str,
    lengths: list[tuple[int, int]],
    concurrency: list[float],
    rate: list[float],
    sm_clocks: list[float],
    agent: str | None,
    gpu_indices: list[int],
    gpu_telemetry: str | None,
    open_s: float,
    seed: int,
    profile: Path | None,
) -> None:
    """Measure a served model: sweep lengths and loads (and clocks), one CSV row each.

    Stop it when you like: run again, it goes on where it was. Nothing else should use the server or its GPUs meanwhile.
    """
    import asyncio

    from benchmarks.adapters.http_streams import Target
    from benchmarks.adapters.profile_measure_run import SweepOrder, run
    from benchmarks.adapters.target_facts import TargetError, first_model
    from benchmarks.profile_measure import Kind, Load, LoadFailedError, sweep
    from energy.adapters.agent_client import AgentClient
    from energy.gpu import GpuError
    from energy.gpus import GPUS
    from energy.profile import ProfileError
    from pools.drivers.port import DriverError
    from pools.drivers.vllm_clocks import GpuClocks
    from pools.instances import GpuSlot

    if len(sm_clocks) > 1 and agent is None:
        raise UserError("--sm-clocks: more than one needs --agent, which sets them")
    if not sm_clocks and gpu not in GPUS:
        raise UserError(f"--sm-clocks: name the clock that {gpu!r} runs at; known GPUs: {', '.join(GPUS)}")
    clocks_mhz = [round(clock) for clock in sm_clocks] or [GPUS[gpu].max_clock_mhz]
    slots = tuple(GpuSlot("node", index) for index in gpu_indices) if agent else ()
    if agent and len(slots) != tp:
        raise UserError(f"--gpu-indices: {len(slots)} given, --tp says {tp}")
    loads = sweep(clocks_mhz, lengths, [round(clients) for clients in concurrency], rate)
    try:
        target = Target.of(url)
        served = asyncio.run(first_model(target))
        order = SweepOrder(
            target,
            served,
            Kind(gpu, model or served, tp, precision),
            loads,
            output,
            open_s=open_s,
            seed=seed,
            gpu_telemetry=gpu_telemetry,
            gpus=slots,
        )
        clocks = GpuClocks({"node": AgentClient(agent, "dynamollm-measure")} if agent else {})
        errors = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as progress:
            bar = progress.add_task("measuring", total=sum(load.requests(open_s) for load in loads))

            def on_load(load: Load, requests: int) -> None:
                progress.update(bar, advance=requests, description=str(load))

            measured = run(order, clocks, on_load)
    except (TargetError, LoadFailedError, DriverError, GpuError, ProfileError, ValueError) as error:
        raise UserError(str(error)) from error
    click.echo(f"{measured} loads measured, {len(loads) - measured} were there; wrote {output}")
    if profile is not None:
        from dynamollm.commands.profile import fit

        context.invoke(fit, files=(output,), output=profile, without_power=gpu_telemetry is None)

"""``dynamollm serve``: the gateway and its cluster in the foreground, until Ctrl-C."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from pathlib import Path

import click
import uvicorn
import uvloop
from rich.console import Console
from rich.table import Table

from dynamollm.adapters.configuration import load
from dynamollm.admin import admin_routes
from dynamollm.commands.config import config_option
from dynamollm.commands.serve_roles import Roles, serve_roles
from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.reload import Reload
from dynamollm.role_server import RoleServer
from dynamollm.settings import Settings
from dynamollm.wiring import Application, build, build_reload, recall
from proxy.serve import calm_collector, gateway_config, listen


@click.command()
@config_option
@click.option(
    "--engine",
    type=click.Choice(["emulator", "vllm", "vllm-emulated", "attach"]),
    help="What runs the instances [default: driver.kind, emulator].",
)
@click.option("--host", help="Address to listen on [default: server.host, 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on [default: server.port, 8080].")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Gateways that share the port."
)
@click.option("--no-controller", is_flag=True, help="Gateways only: controllers elsewhere share the store.")
@click.option("--verbose", "-v", is_flag=True, help="Say what becomes of each instance.")
def command(
    config_file: Path | None,
    engine: str | None,
    host: str | None,
    port: int | None,
    workers: int,
    no_controller: bool,
    verbose: bool,
) -> None:
    """Serve the OpenAI-compatible endpoint over a cluster.

    Without --config it brings up nine typed pools of emulated vLLM instances on this machine. One process does it all,
    unless there are more workers or the store is Redis: then gateways and a controller are processes of their own.
    """

    def read() -> Settings:
        settings = load(config_file, os.environ, engine)
        place = settings.server
        place = dataclasses.replace(place, host=host or place.host, port=place.port if port is None else port)
        return dataclasses.replace(settings, server=place)

    settings = read()
    place = settings.server
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if workers > 1 or no_controller or settings.store.kind == "redis":
        roles = Roles(settings, config_file, engine, workers, not no_controller, verbose)
        asyncio.run(serve_roles(roles))
        return
    application = build(settings)
    a = application
    reload = build_reload(read, a.runner, a.deployment, a.operations, a.control, a.history, a.unix_offset_s)
    try:
        listener = listen(place.host, place.port)
    except OSError as error:
        raise UserError(
            f"cannot listen on {place.host}:{place.port}: {error.strerror}; choose another with --port"
        ) from None
    with contextlib.suppress(KeyboardInterrupt), listener:
        url = "http://{}:{}".format(*listener.getsockname()[:2])
        server = RoleServer(
            gateway_config(application.services, place.shutdown_grace_s, admin_routes(lambda: application, reload))
        )
        uvloop.run(_serve(application, server, [listener], url, reload))


async def _serve(
    application: Application, server: uvicorn.Server, sockets: list[socket.socket], url: str, reload: Reload
) -> None:
    """Run the cluster beside the server; when either ends, end the other."""
    console = Console(stderr=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, reload, console)
    console.print(f"dynamollm: starting {_planned(application.settings)} ...")
    cluster = asyncio.create_task(_run_cluster(application))
    greeting = asyncio.create_task(_greet(application, console, url))
    serving = asyncio.create_task(server.serve(sockets=sockets))
    await asyncio.wait((serving, cluster), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    for task in (greeting, cluster):
        task.cancel()
    results = await asyncio.gather(cluster, greeting, return_exceptions=True)
    await application.probe.close()
    for result in results:
        if isinstance(result, Exception):
            raise result


def _reload(reload: Reload, console: Console) -> None:
    """SIGHUP: follow the configuration as it is now."""
    try:
        console.print(f"dynamollm: reloaded, changed: {', '.join(reload()) or 'nothing'}", highlight=False)
    except UserError as error:
        console.print(f"dynamollm: not reloaded: {error}", highlight=False)


async def _run_cluster(application: Application) -> None:
    """The runner and, once the cluster is up, the controller; both end together."""
    try:
        await application.persistence.restore()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(application.runner.run())
            tasks.create_task(application.persistence.run())
            if application.metering is not None:
                tasks.create_task(application.metering.run())
            if application.carbon is not None:
                tasks.create_task(application.carbon.run())
            await recall(application)
            await application.runner.settled()
            tasks.create_task(application.control.run())
            if application.kept_load is not None:
                tasks.create_task(application.kept_load.run())
            if application.counterfactual is not None:
                tasks.create_task(application.counterfactual.run())
    finally:
        await application.operations.close()
        await application.control.close()


def _planned(settings: Settings) -> str:
    count = sum(pool.instances for pool in settings.pools)
    return f"{count} {settings.driver.kind} instances in {len(settings.pools)} pools"


async def _greet(application: Application, console: Console, url: str) -> None:
    """Once the cluster is up, show it and where to send requests."""
    await application.runner.settled()
    calm_collector()
    console.print(cluster_table(application.deployment))
    model = application.settings.models[0].name
    console.print(f"\n[bold]{url}/v1[/bold] is ready. Try:\n")
    click.echo(
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '"
        f'{{"model": "{model}", "stream": true, "max_tokens": 32, '
        f'"messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}\'\n',
        err=True,
    )
    console.print("Metrics at /metrics, API documentation at /docs. Ctrl-C stops everything.")


def cluster_table(deployment: Deployment) -> Table:
    """The pools and what runs in each."""
    table = Table("Pool", "Model", "TP", "SM clock", "Instances", "State", box=None, pad_edge=False)
    for pool in deployment.settings.pools:
        instances = [i for i in deployment.instances.values() if i.pool == pool.name]
        states = sorted({i.state.value for i in instances}) or ["none"]
        clocks = sorted({i.sm_clock_mhz for i in instances})
        table.add_row(
            pool.name,
            pool.model,
            ", ".join(str(tp) for tp in sorted({i.shape.tp for i in instances})) or str(pool.tp),
            f"{', '.join(map(str, clocks))} MHz" if clocks else "-",
            str(len(instances)),
            ", ".join(states),
        )
    return table

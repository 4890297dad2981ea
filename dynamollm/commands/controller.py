"""``dynamollm controller``: a process that commands the cluster of several gateways, or stands by to do so."""

import asyncio
import contextlib
from pathlib import Path

import click
import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from dynamollm.commander import Commander
from dynamollm.commands.config import config_option
from dynamollm.commands.roles import engine_option, open_port, role_settings, site_option, stdin_option, verbose_option
from dynamollm.controller_app import controller_app
from dynamollm.role_server import RoleServer, serve_beside
from dynamollm.settings import Settings
from dynamollm.shared_wiring import build_commander, process_name
from dynamollm.sharing_metrics import CommanderMetrics
from dynamollm.site_metrics import SiteMetrics
from dynamollm.term import ControllerTerm
from dynamollm.wiring import proxy_settings

GRACE_S = 5


@click.command()
@config_option
@engine_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on, for metrics and operators.")
@click.option("--port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--url", help="Where gateways reach it [default: http://HOST:PORT].")
@click.option("--name", help="What the others call it [default: controller, host and process id].")
@site_option
@stdin_option
@verbose_option
def command(
    config_file: Path | None,
    engine: str | None,
    host: str,
    port: int,
    url: str | None,
    name: str | None,
    site: str,
    watch_stdin: bool,
    verbose: bool,
) -> None:
    """Command the cluster of several gateways: plan, start, stop and clock instances, book their energy.

    Of several controllers one leads, whoever holds the lease in the store; the others stand by, and one of them leads
    within controller.lease_s and a little when it falls silent. With emulated instances, let them run in processes
    that outlive the controller: dynamollm emulate --node, and driver.emulators.
    """

    def read() -> Settings:
        return role_settings(config_file, engine, verbose)

    settings = read()
    commander = build_commander(settings, name or process_name("controller"), read=read)
    listener = open_port(host, port, shared=False)
    with contextlib.suppress(KeyboardInterrupt), listener:
        commander.url = url or "http://{}:{}".format(*listener.getsockname()[:2])
        registry = CollectorRegistry()
        registry.register(CommanderMetrics(commander))
        registry.register(ProcessCollector(registry=None))
        app = controller_app(commander, proxy_settings(settings).api_keys, registry)
        metrics = (
            SiteMetrics(commander.store, site, commander.name, lambda: [generate_latest(registry)]) if site else None
        )
        config = uvicorn.Config(
            app, ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S
        )
        click.echo(f"{commander.name} answers at {commander.url}", err=True)
        uvloop.run(serve_beside(RoleServer(config), [listener], _run(commander, metrics), watch_stdin=watch_stdin))


async def _run(commander: Commander[ControllerTerm], metrics: SiteMetrics | None) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(commander.run())
            if metrics is not None:
                tasks.create_task(metrics.run())
    finally:
        await commander.store.close()

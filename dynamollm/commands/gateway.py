"""``dynamollm gateway``: one gateway process of several; controllers elsewhere command the cluster it routes to."""

import asyncio
import contextlib
from pathlib import Path

import click
import uvloop

from dynamollm.adapters.admin_relay import admin_relay
from dynamollm.commands.config import config_option
from dynamollm.commands.roles import engine_option, open_port, role_settings, site_option, stdin_option, verbose_option
from dynamollm.role_server import RoleServer, serve_beside
from dynamollm.shared_wiring import SharedGateway, build_gateway, process_name
from dynamollm.site_metrics import SiteMetrics
from proxy.serve import calm_collector, gateway_config


@click.command()
@config_option
@engine_option
@click.option("--host", help="Address to listen on [default: server.host, 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on [default: server.port, 8080].")
@click.option("--share-port", is_flag=True, help="Let other gateways of this machine listen on it, too.")
@click.option("--name", help="What the others call it [default: gateway, host and process id].")
@site_option
@stdin_option
@verbose_option
def command(
    config_file: Path | None,
    engine: str | None,
    host: str | None,
    port: int | None,
    share_port: bool,
    name: str | None,
    site: str,
    watch_stdin: bool,
    verbose: bool,
) -> None:
    """Serve the OpenAI-compatible endpoint, routing to the cluster that a controller commands.

    Gateways and controllers find each other in the store, which must be one they can share: store.kind redis, or file
    on one machine.
    """
    settings = role_settings(config_file, engine, verbose)
    gateway = build_gateway(settings, name or process_name("gateway"))
    place = settings.server
    listener = open_port(host or place.host, place.port if port is None else port, share_port)
    with contextlib.suppress(KeyboardInterrupt), listener:
        routes = admin_relay(lambda: gateway.replica.controller_url)
        server = RoleServer(gateway_config(gateway.services, place.shutdown_grace_s, routes))
        click.echo("{} listens at http://{}:{}".format(gateway.replica.name, *listener.getsockname()[:2]), err=True)
        uvloop.run(serve_beside(server, [listener], _run(gateway, site), _calm(gateway), watch_stdin=watch_stdin))


async def _run(gateway: SharedGateway, site: str) -> None:
    metrics = gateway.services.metrics
    try:
        await gateway.persistence.restore()
        async with asyncio.TaskGroup() as tasks:
            for task in (gateway.replica.run(), gateway.scraper.run(), gateway.persistence.run()):
                tasks.create_task(task)
            if site:
                shared = SiteMetrics(gateway.store, site, gateway.replica.name, metrics.parts)
                gateway.services.metrics.answer = shared.parts
                tasks.create_task(shared.run())
    finally:
        await gateway.probe.close()
        await gateway.store.close()


async def _calm(gateway: SharedGateway) -> None:
    await gateway.replica.following()
    calm_collector()

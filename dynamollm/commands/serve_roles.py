"""``dynamollm serve`` as several processes of this machine: gateways that share a port, and a controller."""

import asyncio
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from dynamollm.adapters.supervisor import Supervisor
from dynamollm.errors import UserError
from dynamollm.settings import Settings

END_S = 10.0  # beyond the grace of the streams
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Roles:
    """What to run."""

    settings: Settings
    config_file: Path | None
    engine: str | None
    gateways: int
    controller: bool
    verbose: bool


async def serve_roles(roles: Roles) -> None:
    """Run the processes until a signal. Raises ``UserError`` where nothing can be shared, or the port is taken."""
    place = roles.settings.server
    with tempfile.TemporaryDirectory(prefix="dynamollm-") as folder, _reserved(place.host, place.port) as held:
        environment = dict(os.environ)
        if roles.settings.store.kind == "memory":
            if not roles.controller:
                raise UserError("store.kind: memory is of one machine's processes; a controller elsewhere needs redis")
            environment |= {"DYNAMOLLM_STORE__KIND": "file", "DYNAMOLLM_STORE__FOLDER": folder}
        host, port = held.getsockname()[:2]
        url = f"http://{host}:{port}"
        supervisor = Supervisor(_commands(roles, host, port), environment, place.shutdown_grace_s + END_S)
        greeting = asyncio.create_task(_greet(url, roles.gateways))
        try:
            await supervisor.run()
        finally:
            greeting.cancel()


def _commands(roles: Roles, host: str, port: int) -> list[list[Sequence[str]]]:
    """Gateways, then the controller: in the order in which they end."""
    common = ["--watch-stdin", "--site", f"{socket.gethostname()}:{port}"]
    common += ["--config", str(roles.config_file)] if roles.config_file else []
    common += ["--engine", roles.engine] if roles.engine else []
    common += ["--verbose"] if roles.verbose else []
    gateway = ["gateway", "--host", host, "--port", str(port), "--share-port", *common]
    controller = ["controller", "--port", "0", *common]
    return [[gateway] * roles.gateways, [controller] if roles.controller else []]


def _reserved(host: str, port: int) -> socket.socket:
    """A socket that holds the port for those who share it, and takes no connection. Raises ``UserError``."""
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    return held


async def _greet(url: str, gateways: int) -> None:
    """Once requests are served, say where."""
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                if (await client.get(f"{url}/ready")).is_success:
                    break
            except httpx.HTTPError:
                pass
            await asyncio.sleep(LOOK_S)
    click.echo(f"{url}/v1 is ready, served by {gateways} gateways. Ctrl-C stops everything.", err=True)

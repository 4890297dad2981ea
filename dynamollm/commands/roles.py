"""What the commands of one process among several have in common: options, settings that can be shared, a port."""

import logging
import os
import socket
from pathlib import Path

import click

from dynamollm.adapters.configuration import load
from dynamollm.errors import UserError
from dynamollm.settings import Settings
from proxy.serve import listen

engine_option = click.option(
    "--engine",
    type=click.Choice(["emulator", "vllm", "vllm-emulated", "attach"]),
    help="What runs the instances [default: driver.kind, emulator].",
)
verbose_option = click.option("--verbose", "-v", is_flag=True, help="Say what becomes of each instance.")

site_option = click.option(
    "--site", default="", help="Processes of one site answer /metrics for all of it [default: each for itself]."
)
stdin_option = click.option("--watch-stdin", is_flag=True, help="End when standard input closes.")


def speak(verbose: bool) -> None:
    """Log to standard error."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def role_settings(config_file: Path | None, engine: str | None, verbose: bool) -> Settings:
    """The settings of one process among several. Raises ``UserError`` for a store they cannot share."""
    settings = load(config_file, os.environ, engine)
    if settings.store.kind == "memory":
        raise UserError("store.kind: memory is of one process; gateways and controllers share redis, or a file")
    speak(verbose)
    return settings


def open_port(host: str, port: int, shared: bool) -> socket.socket:
    """A listening socket. Raises ``UserError`` where it cannot be had."""
    try:
        return listen(host, port, shared)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None

"""The uvicorn configuration the gateway needs, and what keeps its event loop free of pauses."""

import gc
import socket

import uvicorn
from fastapi import APIRouter

from proxy.app import create_app
from proxy.gateway import Gateway
from proxy.services import GatewayServices

_GC_THRESHOLDS = (50_000, 20, 100)  # the relayed path makes no cycles: collect seldom
_BACKLOG = 4096


def gateway_config(
    services: GatewayServices, shutdown_grace_s: float = 30.0, admin: APIRouter | None = None
) -> uvicorn.Config:
    """The configuration of ``uvicorn.Server`` for one gateway process; ``admin`` as in ``create_app``."""
    gateway = Gateway(services)
    return uvicorn.Config(
        create_app(gateway, admin),
        http=gateway.protocol,
        ws="none",
        loop="uvloop",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, round(shutdown_grace_s)),
    )


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening socket; ``shared`` with other processes that ask for the same (SO_REUSEPORT). Raises ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def calm_collector() -> None:
    """Take what is loaded out of the garbage collector's sight, and let it run seldom. Call once everything is made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)

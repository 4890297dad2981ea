"""Persistence: keeps what was learned and booked over a restart, in the deployment's store.

Each part (token estimates, output lengths, the energy ledger) gives a plain document and takes one back. They are saved
together now and then and at the end; a store that cannot be read or written costs the memory, never the service.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from dynamollm.store import Store

log = logging.getLogger("dynamollm.persistence")

PERIOD_S = 60.0


class Remembering(Protocol):
    """Something that can be saved."""

    def snapshot(self) -> dict[str, Any]:
        """All of it, as plain values."""

    def restore(self, snapshot: dict[str, Any], /) -> None:
        """Take a snapshot over. Raises ``ValueError`` if it is not one."""


class Persistence:
    """``restore`` before anything runs; ``run`` as a task, or ``save`` at will."""

    def __init__(self, store: Store, parts: Mapping[str, Remembering]) -> None:
        self._store = store
        self._parts = dict(parts)

    async def restore(self) -> None:
        """Give every part its document; one that is missing or unusable begins anew, and that is said."""
        for name, part in self._parts.items():
            try:
                document = await self._store.read(name)
                if document is not None:
                    part.restore(document)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("what was remembered of %s cannot be used, it begins anew: %s", name, error)

    async def save(self) -> None:
        """Save every part; a failure is said and tried again next time."""
        for name, part in self._parts.items():
            try:
                await self._store.write(name, part.snapshot())
            except OSError as error:
                log.warning("%s cannot be saved: %s", name, error)

    async def run(self) -> None:
        """Save every minute, and when cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                await self.save()
        finally:
            await self.save()

"""KeptLoad: past load in the deployment's store, so that who controls begins with what came before it began.

A minute at a time goes to the end of a stream of bounded length, so a process that is killed loses the last minute. A
store that cannot be read or written costs the memory, never the service.
"""

import asyncio
import logging

from dynamollm.load_history import MOST_WRITTEN, WRITTEN_S, LoadHistory
from dynamollm.reports import LOAD
from dynamollm.store import BEGINNING, Store

log = logging.getLogger("dynamollm.load")

LOOKED_S = 5.0
ENTRIES = 1000


class KeptLoad:
    """``restore`` before anything controls; then ``run`` as a task, or ``save`` at will."""

    def __init__(self, store: Store, history: LoadHistory, demands: int) -> None:
        self._store = store
        self._history = history
        self._demands = demands

    async def restore(self) -> None:
        """Give the history what was kept; what cannot be used is said, and learned anew."""
        after = BEGINNING
        try:
            while entries := await self._store.entries(LOAD, after, ENTRIES):
                self._history.read((plain for _, plain in entries), self._demands)
                after = entries[-1][0]
        except (OSError, ValueError) as error:
            log.warning("past load cannot be read, it is learned anew: %s", error)

    async def save(self, least_s: float = WRITTEN_S) -> None:
        """Append what is not written yet, if it is that much time. Raises ``OSError`` where the store is away."""
        if minutes := self._history.to_write(least_s):
            await self._store.append(LOAD, minutes, MOST_WRITTEN)

    async def run(self) -> None:
        """Save every minute, and when cancelled all there is."""
        try:
            while True:
                await asyncio.sleep(LOOKED_S)
                await self._tried()
        finally:
            await self._tried(least_s=0.0)

    async def _tried(self, least_s: float = WRITTEN_S) -> None:
        try:
            await self.save(least_s)
        except OSError as error:
            log.warning("load cannot be kept: %s", error)

"""EventBroadcast: one stream of InstanceEvents to any number of listeners, in order, within one event loop."""

import asyncio
from collections.abc import AsyncIterator

from pools.drivers.port import InstanceEvent


class EventBroadcast:
    """Publish without waiting; a listener hears all that is published after it began to listen."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[InstanceEvent | None]] = set()
        self._closed = False

    def publish(self, event: InstanceEvent) -> None:
        """Give an event to every present listener."""
        for queue in self._queues:
            queue.put_nowait(event)

    def listen(self) -> AsyncIterator[InstanceEvent]:
        """Events from this call on (not from the first ``anext``), until ``close``."""
        queue: asyncio.Queue[InstanceEvent | None] = asyncio.Queue()
        if self._closed:
            queue.put_nowait(None)
        self._queues.add(queue)
        return self._drain(queue)

    async def _drain(self, queue: asyncio.Queue[InstanceEvent | None]) -> AsyncIterator[InstanceEvent]:
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """End every listener once it has heard what was published so far."""
        self._closed = True
        for queue in self._queues:
            queue.put_nowait(None)

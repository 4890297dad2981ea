"""Spawned: tasks that nobody awaits, kept alive until they end; what they raise is not lost."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Spawned:
    """Runs coroutines on the side."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Start one; an exception goes to the event loop's handler."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": f"{task.get_name()} failed", "exception": error})

    def cancel(self) -> None:
        """Stop them all."""
        for task in tuple(self._tasks):
            task.cancel()

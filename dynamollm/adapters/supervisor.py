"""Supervisor: the processes of `dynamollm serve` where it is several: kept up, and ended together.

Each is started again when it ends by itself, after a moment. Each is told by the end of its standard input that its
supervisor is gone, however that died. A signal ends gateways first, so that what they owe the others is still heard.
"""

import asyncio
import logging
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence

log = logging.getLogger("dynamollm.supervisor")

RESTART_S = 1.0


class Supervisor:
    """``run`` it; ``end`` it, or let a signal do so."""

    def __init__(
        self, groups: Sequence[Sequence[Sequence[str]]], environment: Mapping[str, str], grace_s: float
    ) -> None:
        """``groups`` of commands (``dynamollm`` and its arguments), ended one group after another."""
        self._groups = groups
        self._environment = dict(environment)
        self._grace_s = grace_s
        self._ending = asyncio.Event()

    def end(self) -> None:
        """End all of them."""
        self._ending.set()

    async def run(self) -> None:
        """Keep them up until told to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end)
        groups = [[asyncio.create_task(self._keep(command)) for command in group] for group in self._groups]
        await self._ending.wait()
        for tasks in groups:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, command: Sequence[str]) -> None:
        while True:
            # a session of its own: Ctrl-C is for the supervisor
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamollm", *command, stdin=PIPE, env=self._environment, start_new_session=True
            )
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                await self._stop(process)
                raise
            log.warning("%s ended with status %d; it is started again", command[0], status)
            await asyncio.sleep(RESTART_S)

    async def _stop(self, process: Process) -> None:
        process.terminate()
        try:
            async with asyncio.timeout(self._grace_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

"""NodeAgent: sets the clocks of one node's GPUs for controllers elsewhere, and takes every lock off again.

What it promises: a GPU it has locked is back at its default clocks when the controller says so, when the controller
has been silent for the lease's time, when the agent ends in order, and, if the agent was killed, as soon as one starts
again (or ``dynamollm agent --restore`` is run): a lock is written to the journal before it is set, and struck out after
it is reset. It touches only the GPUs it was given. Pure but for its ports (GPUs, journal); given ``now_s``; wire and
clock are in ``energy/adapters/agent_*.py``.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from energy.gpu import ClockLock, Gpu, GpuDriverError, GpuError, GpuReading, NoSuchGpuError, read, snap_lock
from energy.leases import Lease, LeaseTable

log = logging.getLogger("dynamollm.agent")


class LockJournal(Protocol):
    """Where locks are noted so that they outlive the agent."""

    def read(self) -> dict[str, ClockLock]:
        """The locks noted, by GPU UUID."""

    def write(self, locks: Mapping[str, ClockLock]) -> None:
        """Note these and no others; a process that starts later reads them. Raises ``OSError``."""


class NodeAgent:
    """All the GPUs one agent is allowed to set."""

    def __init__(self, node: str, gpus: Sequence[Gpu], journal: LockJournal, leases: LeaseTable) -> None:
        self.node = node
        self.drifts = 0  # locks found undone by somebody else, and set again
        self.failures: dict[str, int] = {}  # by kind of error
        self._gpus = {gpu.index: gpu for gpu in gpus}
        self._by_uuid = {gpu.uuid: gpu for gpu in gpus}
        self._journal = journal
        self._leases = leases
        self._noted = dict(journal.read())

    @property
    def indices(self) -> tuple[int, ...]:
        """GPUs in its scope."""
        return tuple(self._gpus)

    @property
    def orphans(self) -> tuple[str, ...]:
        """GPUs noted as locked in the journal, by UUID."""
        return tuple(self._noted)

    def gpu(self, index: int) -> Gpu:
        """The GPU of this index. Raises ``NoSuchGpuError``."""
        try:
            return self._gpus[index]
        except KeyError:
            scope = ", ".join(map(str, self._gpus)) or "none"
            raise NoSuchGpuError(f"no such GPU: {index}; this agent's scope is {scope}") from None

    def lease(self, index: int) -> Lease | None:
        """The lease on this GPU. Raises ``NoSuchGpuError``."""
        return self._leases.leases.get(self.gpu(index).uuid)

    # --- what controllers ask ----------------------------------------------------------------------------------------

    def lock(
        self, indices: Iterable[int], lock: ClockLock, holder: str, now_s: float, ttl_s: float | None = None
    ) -> None:
        """Lock these GPUs to the supported clocks nearest to ``lock``, and begin their leases.

        All are checked before the first is written. Raises ``NoSuchGpuError``, ``ClockRangeError``,
        ``ClockDwellError`` with nothing written; ``GpuError`` of the first GPU that refuses; ``OSError`` from the
        journal. Those locked before the one that failed keep their leases.
        """
        gpus = [self.gpu(index) for index in indices]
        locks = {gpu.uuid: snap_lock(lock, gpu.supported_sm_clocks_mhz()) for gpu in gpus}
        to_write = [gpu for gpu in gpus if self._leases.must_write(gpu.uuid, locks[gpu.uuid], now_s)]
        if to_write:
            self._note({**self._noted, **{gpu.uuid: locks[gpu.uuid] for gpu in to_write}})
        for gpu in gpus:
            if gpu in to_write:
                self._write(gpu, locks[gpu.uuid])
            self._leases.hold(gpu.uuid, locks[gpu.uuid], holder, now_s, ttl_s)

    def reset(self, indices: Iterable[int], now_s: float) -> None:
        """Take the locks off these GPUs, whoever set them: of all that can be, then the first error is raised.

        Raises ``NoSuchGpuError`` with nothing reset, ``GpuError``, ``OSError``.
        """
        errors = []
        for gpu in [self.gpu(index) for index in indices]:
            try:
                self._reset(gpu, now_s)
            except (GpuError, OSError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def renew(self, indices: Iterable[int], holder: str, now_s: float) -> dict[int, Lease]:
        """Those of these GPUs that the holder still holds, leases begun anew. Raises ``NoSuchGpuError``."""
        uuids = {self.gpu(index).uuid: index for index in indices}
        return {uuids[uuid]: lease for uuid, lease in self._leases.renew(uuids, holder, now_s).items()}

    def readings(self) -> list[GpuReading]:
        """What every GPU reads; one that is lost is left out and counted."""
        readings = []
        for gpu in self._gpus.values():
            try:
                readings.append(read(gpu, self.node))
            except GpuError as error:
                self._count(error)
        return readings

    # --- what keeps the promise --------------------------------------------------------------------------------------

    def restore_orphans(self, now_s: float) -> list[str]:
        """Reset what an agent before this one left locked. Returns the UUIDs reset; failures stay in the journal."""
        outside = [uuid for uuid in self._noted if uuid not in self._by_uuid]
        for uuid in outside:
            log.warning("GPU %s was left locked but is not in this agent's scope; reset it yourself", uuid)
        orphans = [uuid for uuid in self._noted if uuid in self._by_uuid]
        restored = [uuid for uuid in orphans if self._reset_or_log(uuid, now_s)]
        if restored:
            log.warning("reset %d GPU(s) that an earlier agent left locked: %s", len(restored), ", ".join(restored))
        return restored

    def tick(self, now_s: float) -> None:
        """Reset the GPUs whose lease ran out, and set again the locks that somebody else undid. Call every second.

        Raises ``GpuDriverError`` when the driver went away: an agent started anew finds it again, and the orphans.
        """
        for uuid in self._leases.lapsed(now_s):
            held = self._leases.leases[uuid]
            log.warning("GPU %s: %s was silent for %g s; back to default clocks", uuid, held.holder, held.ttl_s)
            self._reset_or_log(uuid, now_s)
        for uuid, held in tuple(self._leases.leases.items()):
            if now_s < held.expires_s:
                self._check(self._by_uuid[uuid], held.lock)

    def release_all(self, now_s: float) -> list[str]:
        """Reset every lock this agent set, at its end. Returns the UUIDs that could not be; the journal keeps them."""
        ours = [uuid for uuid in self._noted if uuid in self._by_uuid]
        return [uuid for uuid in ours if not self._reset_or_log(uuid, now_s)]

    def _write(self, gpu: Gpu, lock: ClockLock) -> None:
        try:
            gpu.lock_sm_clocks(lock)
        except GpuError as error:
            self._count(error)
            raise

    def _check(self, gpu: Gpu, lock: ClockLock) -> None:
        """A clock above its lock means that the lock is gone."""
        try:
            if gpu.sm_clock_mhz() > lock.high_mhz:
                self.drifts += 1
                log.warning("GPU %d runs above its lock of %s; setting it again", gpu.index, lock)
                gpu.lock_sm_clocks(lock)
        except GpuDriverError:
            raise
        except GpuError as error:
            self._count(error)
            log.warning("GPU %d: cannot check its clock: %s", gpu.index, error)

    def _reset_or_log(self, uuid: str, now_s: float) -> bool:
        try:
            self._reset(self._by_uuid[uuid], now_s)
        except (GpuError, OSError) as error:
            log.error("GPU %s: cannot reset its clocks, will try again: %s", uuid, error)
            return False
        return True

    def _reset(self, gpu: Gpu, now_s: float) -> None:
        try:
            gpu.reset_sm_clocks()
        except GpuError as error:
            self._count(error)
            raise
        self._leases.release(gpu.uuid, now_s)
        self._note({uuid: lock for uuid, lock in self._noted.items() if uuid != gpu.uuid})

    def _note(self, locks: dict[str, ClockLock]) -> None:
        if locks != self._noted:
            self._journal.write(locks)
            self._noted = locks

    def _count(self, error: GpuError) -> None:
        kind = type(error).__name__
        self.failures[kind] = self.failures.get(kind, 0) + 1

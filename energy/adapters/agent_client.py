"""The GPUs of another machine, or another process, through its node agent: the Gpu port over HTTP, by httpx.

Works with ``dynamollm agent``, with the emulator's node agents, and with zeusd. Blocking: an event loop calls it in a
thread. A lock is a lease: whoever holds it calls ``renew`` from its own control loop, at least every third of the
lease's time, so that a controller that hangs loses its locks as one that died does. Not thread-safe.
"""

from collections.abc import Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from energy import agent_wire as wire
from energy.dcgm import read_dcgm
from energy.gpu import ClockEvent, ClockLock, GpuAgentError, GpuLostError, GpuReading, GpuUnsupportedError

_UNIX = "unix:"
_Value = TypeVar("_Value")


class AgentClient:
    """One agent, at ``unix:/path/of/socket`` or ``http://host:port``.

    ``holder`` names whoever asks for locks. They lapse after ``lease_s`` without a sign of life, or after the agent's
    own time if that is shorter or none is given.
    """

    def __init__(
        self,
        address: str,
        holder: str,
        token: str | None = None,
        lease_s: float | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.address = address
        self._holder = {"holder": holder} if lease_s is None else {"holder": holder, "lease_s": lease_s}
        self._locks: dict[int, ClockLock] = {}
        unix = address.startswith(_UNIX)
        self._http = httpx.Client(
            base_url="http://agent" if unix else address,
            transport=httpx.HTTPTransport(uds=address.removeprefix(_UNIX)) if unix else httpx.HTTPTransport(),
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; locks stay until their leases run out."""
        self._http.close()

    def gpus(self) -> tuple["AgentGpu", ...]:
        """The GPUs in the agent's scope. Raises ``GpuAgentError``."""
        return tuple(AgentGpu(self, reading) for reading in self.readings())

    def readings(self) -> list[GpuReading]:
        """What all its GPUs read. Raises ``GpuAgentError``."""
        try:
            return read_dcgm(self._ask("GET", wire.METRICS).text)
        except (ValueError, KeyError) as error:
            raise GpuAgentError(f"agent {self.address}: its metrics are not DCGM's: {error}") from None

    def lock(self, indices: Sequence[int], lock: ClockLock) -> None:
        """Lock these GPUs in one call, or begin their leases anew where they are locked so. Raises ``GpuError``s."""
        query = {"min_clock_mhz": lock.low_mhz, "max_clock_mhz": lock.high_mhz, "block": "true"}
        self._ask("POST", wire.SET_CLOCKS, indices, **query)
        self._locks.update(dict.fromkeys(indices, lock))

    def reset(self, indices: Sequence[int]) -> None:
        """Take the locks off these GPUs. Raises ``GpuError``s."""
        self._ask("POST", wire.RESET_CLOCKS, indices, block="true")
        for index in indices:
            self._locks.pop(index, None)

    def renew(self) -> tuple[int, ...]:
        """Begin the leases of every lock set here anew. Returns the GPUs whose lock is lost, to be locked again.

        An agent without leases keeps locks for ever, and loses none. Raises ``GpuAgentError``.
        """
        if not self._locks:
            return ()
        try:
            held = self._ask("POST", wire.RENEW, tuple(self._locks)).json()
        except _NoSuchPathError:
            return ()
        lost = tuple(index for index in self._locks if str(index) not in held)
        for index in lost:
            del self._locks[index]
        return lost

    def locked(self, index: int) -> ClockLock | None:
        """The lock on this GPU, as the agent or, where it does not tell, this client knows it."""
        told = self.told(wire.GET_LOCKED, index)
        if told is None:
            return self._locks.get(index)
        lock = told.get(str(index))
        return None if lock is None else ClockLock(lock["min_clock_mhz"], lock["max_clock_mhz"])

    def told(self, path: str, index: int) -> dict[str, Any] | None:
        """JSON the agent tells of one GPU; None if it does not know the path. Raises ``GpuError``s."""
        try:
            answer = self._ask("GET", path, (index,)).json()
        except _NoSuchPathError:
            return None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise GpuAgentError(f"agent {self.address}: {path} is not answered with a JSON object")
        return answer

    def _ask(self, method: str, path: str, indices: Sequence[int] = (), **query: object) -> httpx.Response:
        if indices:
            query["gpu_ids"] = ",".join(map(str, indices))
        if method == "POST":
            query |= self._holder
        try:
            answer = self._http.request(method, path, params={name: str(value) for name, value in query.items()})
        except httpx.HTTPError as error:
            raise GpuAgentError(f"agent {self.address}: {type(error).__name__}: {error}") from None
        if answer.status_code == HTTPStatus.NOT_FOUND:
            raise _NoSuchPathError(f"agent {self.address}: {method} {path} is not known there")
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            raise GpuAgentError(f"agent {self.address}: its token is wrong or missing")
        if not answer.is_success:
            raise wire.error_of_answer(self.address, answer.status_code, answer.content)
        return answer


class _NoSuchPathError(GpuAgentError):
    """The agent does not know the path."""


class AgentGpu:
    """One GPU of an agent."""

    def __init__(self, agent: AgentClient, reading: GpuReading) -> None:
        self.index = reading.index
        self.uuid = reading.uuid
        self.name = reading.name
        self._agent = agent
        self._what = f"GPU {reading.index} of agent {agent.address}"

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """What the agent says; empty if it does not (it snaps by itself)."""
        told = self._agent.told(wire.GET_SUPPORTED, self.index)
        return () if told is None else tuple(told.get(str(self.index), ()))

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Lock it, on a lease."""
        self._agent.lock((self.index,), lock)

    def reset_sm_clocks(self) -> None:
        """Take the lock off."""
        self._agent.reset((self.index,))

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock the agent holds."""
        return self._agent.locked(self.index)

    def sm_clock_mhz(self) -> int:
        """SM clock now."""
        return self._had(self._reading().sm_clock_mhz, "SM clock")

    def power_w(self) -> float:
        """Power draw."""
        return self._had(self._reading().power_w, "power")

    def energy_j(self) -> float:
        """Energy counter."""
        return self._had(self._reading().energy_j, "energy counter")

    def temperature_c(self) -> float:
        """Temperature of the die."""
        return self._had(self._reading().temperature_c, "temperature")

    def clock_events(self) -> ClockEvent:
        """Why it is slow; an agent that does not say is taken to have no reason."""
        return self._reading().clock_events or ClockEvent.NONE

    def _reading(self) -> GpuReading:
        for reading in self._agent.readings():
            if reading.index == self.index:
                return reading
        raise GpuLostError(f"{self._what} is not among the agent's readings: it is lost, or out of scope")

    def _had(self, value: _Value | None, what: str) -> _Value:
        if value is None:
            raise GpuUnsupportedError(f"{self._what} has no {what}")
        return value

"""Gateway: one process' relayed path put together: admission, waiting requests, connections, the clock's tick.

Made once; ``protocol`` is the class to give to ``uvicorn.Config(http=...)`` beside the application of proxy.app.
"""

import asyncio

from proxy import errors, wire
from proxy.admission import Admission, Admitted
from proxy.errors import ApiError
from proxy.protocol import Exchange, GatewayProtocol
from proxy.relay import Link, Relay
from proxy.services import GatewayServices
from proxy.upstream import ConnectionPool

TICK_S = 0.05  # bounds how late a deadline is noticed, and how long a place stays unoffered


class Gateway:
    """The relays' ``Network``, and what their clients' connections belong to."""

    def __init__(self, services: GatewayServices) -> None:
        self.services = services
        self.draining = False
        self._admission = Admission(services)
        self._pool = ConnectionPool(services.settings, services.clock)
        self._waiting: dict[str, Relay] = {}
        self._connections: set[GatewayProtocol] = set()
        self._settling = False
        self._timer: asyncio.TimerHandle | None = None
        self.protocol: type[GatewayProtocol] = type("BoundGatewayProtocol", (GatewayProtocol,), {"gateway": self})

    # Life

    def start(self) -> None:
        """Begin to tick; inside a running loop."""
        self._arm()

    async def stop(self) -> None:
        """End every stream that is still open with an error event, and close."""
        self.draining = True
        now_s = self.services.clock()
        for connection in list(self._connections):
            connection.stop(now_s)
        for _ in range(20):
            if not self._connections:
                break
            await asyncio.sleep(0.05)
        self._pool.close()
        if self._timer is not None:
            self._timer.cancel()

    def authorize(self, authorization: bytes | None) -> None:
        """Raises ``ApiError`` 401 for a caller without one of the configured keys."""
        self._admission.authorize(authorization)

    @property
    def open_connections(self) -> int:
        """Connections to instances, busy and idle."""
        return self._pool.open_connections

    # For connections

    def connected(self, connection: GatewayProtocol) -> None:
        """A client connected."""
        self._connections.add(connection)

    def disconnected(self, connection: GatewayProtocol) -> None:
        """A client left."""
        self._connections.discard(connection)

    def begin(self, exchange: Exchange, body: bytes) -> None:
        """A whole request is there: admit it and start its relay, or refuse it."""
        services = self.services
        now_s = services.clock()
        request_id = self._admission.next_id()
        try:
            if self.draining:
                raise errors.shutting_down()
            admitted = self._admission.admit(exchange.path, exchange.headers, body, request_id, now_s)
        except ApiError as error:
            self._refuse(exchange, error, request_id)
            return
        relay = Relay(admitted, exchange, self, services)
        exchange.relay = relay
        relay.start(now_s)

    def _refuse(self, exchange: Exchange, error: ApiError, request_id: str) -> None:
        self.services.metrics.refused.add((str(error.status),))
        exchange.write(wire.error_answer(error, b"x-request-id: %b\r\n" % request_id.encode(), exchange.keep_alive))
        exchange.finish()

    # Network

    def send(self, instance_id: str, admitted: Admitted, relay: Relay) -> Link | None:
        """Send a request to an instance."""
        address = self.services.directory.address(instance_id)
        if address is None:
            return None
        return self._pool.send(address, admitted.message(address.authority), relay)

    def wait(self, request_id: str, relay: Relay) -> None:
        """Keep a queued request."""
        if self.draining:
            relay.shutdown(self.services.clock())
        else:
            self._waiting[request_id] = relay

    def settle(self, request_id: str) -> None:
        """A request left: others may go."""
        waiting = self._waiting
        if waiting:
            waiting.pop(request_id, None)
            if waiting and not self._settling:
                self._release(self.services.clock())

    def _release(self, now_s: float) -> None:
        self._settling = True
        try:
            while released := self.services.router.release(now_s):
                for request, decision in released:
                    relay = self._waiting.pop(request.id, None)
                    if relay is not None:
                        relay.decision(decision, now_s)
        finally:
            self._settling = False

    def drain(self) -> None:
        """Take nothing new; those waiting are told so."""
        if self.draining:
            return
        self.draining = True
        now_s = self.services.clock()
        for relay in list(self._waiting.values()):
            relay.shutdown(now_s)

    def tick(self, now_s: float) -> None:
        """Enforce deadlines, offer places to those waiting, close idle connections."""
        for connection in list(self._connections):
            connection.check_deadlines(now_s)
        if self._waiting:
            self._release(now_s)
        self._pool.expire(now_s)
        metrics = self.services.metrics
        metrics.set_gauge("dynamollm_client_connections", "Open client connections", len(self._connections))
        metrics.set_gauge("dynamollm_upstream_connections", "Open instance connections", self._pool.open_connections)
        metrics.set_gauge("dynamollm_waiting_requests", "Requests waiting for an instance", len(self._waiting))

    def _on_timer(self, due_s: float) -> None:
        now_s = self.services.clock()
        self.services.metrics.loop_lag.observe((), max(0.0, now_s - due_s))
        self.tick(now_s)
        self._arm()

    def _arm(self) -> None:
        due_s = self.services.clock() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._on_timer, due_s)

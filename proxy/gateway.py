"""Gateway: one process' relayed path put together: admission, waiting requests, connections, the clock's tick.

Made once; ``protocol`` is the class to give to ``uvicorn.Config(http=...)`` beside the application of proxy.app.
"""

import asyncio

from pools.tokens import TokenCount
from proxy import errors, wire
from proxy.admission import Admission, Admitted, Undecided
from proxy.errors import ApiError
from proxy.heads import ClientHead, Headers
from proxy.outcome import Outcome
from proxy.protocol import Exchange, GatewayProtocol
from proxy.relay import Link, Relay, State
from proxy.services import GatewayServices
from proxy.upstream import ConnectionPool

_CHECKED_A_TICK = 64  # connections whose deadlines are looked at, at least
TICK_S = 0.05  # bounds how late a deadline is noticed, and how long a place stays unoffered


class Gateway:
    """The relays' ``Network``, and what their clients' connections belong to."""

    def __init__(self, services: GatewayServices) -> None:
        self.services = services
        self.draining = False
        self.now_s = services.clock()  # at the last tick: enough for what is measured in seconds
        self._admission = Admission(services)
        self._pool = ConnectionPool(services.settings, services.clock)
        self._relays: dict[str, Relay] = {}  # all that are not done
        self._waiting = 0
        self._to_learn: list[Outcome] = []
        self._learned_per_tick = services.settings.learned_per_tick
        self._count = services.metrics.count
        self._observers = services.observers
        self._address = services.directory.address
        self._connections: set[GatewayProtocol] = set()
        self._unchecked: list[GatewayProtocol] = []  # of those, the ones whose deadlines are still to be looked at
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

    def read_head(self, headers: Headers) -> ClientHead:
        """The headers of a relayed request, read."""
        return self._admission.read_head(headers)

    def connected(self, connection: GatewayProtocol) -> None:
        """A client connected."""
        self._connections.add(connection)

    def disconnected(self, connection: GatewayProtocol) -> None:
        """A client left."""
        self._connections.discard(connection)

    def begin(self, exchange: Exchange, body: bytes, input_tokens: int | None = None) -> None:
        """A whole request is there: admit it and start its relay, or refuse it."""
        services = self.services
        now_s = services.clock()
        request_id = self._admission.next_id()
        try:
            if self.draining:
                raise errors.shutting_down()
            admitted = self._admission.admit(exchange.path, exchange.head, body, request_id, now_s, input_tokens)
        except ApiError as error:
            self._refuse(exchange, error, request_id)
            return
        if isinstance(admitted, Undecided):
            self._count_tokens(exchange, body, admitted)
            return
        relay = exchange.relay = self._relays[request_id] = Relay(admitted, exchange, self, services)
        relay.start(now_s)

    def _count_tokens(self, exchange: Exchange, body: bytes, undecided: Undecided) -> None:
        """Count a long prompt in a thread; the request goes on when that is done."""
        counting = asyncio.get_running_loop().run_in_executor(None, undecided.count)

        def counted(done: asyncio.Future[TokenCount]) -> None:
            if exchange.disconnected or done.cancelled():
                return
            if done.exception() is None:
                self.begin(exchange, body, done.result().tokens)
            else:  # text the tokenizer or template refuses: the engine will say what is wrong with it
                self.begin(exchange, body, max(1, len(body) // 4))

        counting.add_done_callback(counted)

    def _refuse(self, exchange: Exchange, error: ApiError, request_id: str) -> None:
        self.services.metrics.refused.add((str(error.status),))
        exchange.write(wire.error_answer(error, b"x-request-id: %b\r\n" % request_id.encode(), exchange.keep_alive))
        exchange.finish()

    # Network

    def send(self, instance_id: str, admitted: Admitted, relay: Relay) -> Link | None:
        """Send a request to an instance."""
        address = self._address(instance_id)
        return None if address is None else self._pool.send(address, admitted.message(address.authority), relay)

    def wait(self, relay: Relay) -> None:
        """A request is queued."""
        self._waiting += 1
        if self.draining:
            relay.shutdown(self.services.clock())

    def waited(self) -> None:
        """A queued request is not queued any more."""
        self._waiting -= 1

    def ended(self, outcome: Outcome) -> None:
        """A request is done: account for it; show it to predictors at the next tick, where there is room."""
        self._count(outcome)
        for observe in self._observers:
            observe(outcome)
        if len(self._to_learn) < self._learned_per_tick:
            self._to_learn.append(outcome)
        del self._relays[outcome.request.id]
        if self._waiting and not self._settling:
            self._release(self.services.clock())

    def _release(self, now_s: float) -> None:
        self._settling = True
        try:
            while released := self.services.router.release(now_s):
                for request, decision in released:
                    relay = self._relays.get(request.id)
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
        for relay in list(self._relays.values()):
            if relay.state is State.QUEUED:
                relay.shutdown(now_s)

    def tick(self, now_s: float) -> None:
        """Enforce deadlines, offer places to those waiting, close idle connections."""
        self.now_s = now_s
        self._check_some(now_s)
        for escalated in self.services.router.escalate(now_s):
            relay = self._relays.get(escalated.request.id)
            if relay is not None:
                relay.moved(escalated.decision, now_s)
        if self._waiting:
            self._release(now_s)
        self._pool.expire(now_s)
        outcomes, self._to_learn = self._to_learn, []
        for learn in self.services.learners:
            for outcome in outcomes:
                learn(outcome)
        metrics = self.services.metrics
        metrics.settle()
        metrics.set_gauge("dynamollm_client_connections", "Open client connections", len(self._connections))
        metrics.set_gauge("dynamollm_upstream_connections", "Open instance connections", self._pool.open_connections)
        metrics.set_gauge("dynamollm_waiting_requests", "Requests waiting for an instance", self._waiting)

    def _check_some(self, now_s: float) -> None:
        """Look at a part of the connections, so that many do not hold up the loop: each comes about once a second."""
        if not self._unchecked:
            self._unchecked = list(self._connections)
        count = max(_CHECKED_A_TICK, int(len(self._connections) * TICK_S))
        some, self._unchecked = self._unchecked[:count], self._unchecked[count:]
        for connection in some:
            if connection in self._connections:
                connection.check_deadlines(now_s)

    def _on_timer(self, due_s: float) -> None:
        now_s = self.services.clock()
        self.services.metrics.loop_lag.observe((), max(0.0, now_s - due_s))
        self.tick(now_s)
        self._arm()

    def _arm(self) -> None:
        due_s = self.services.clock() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._on_timer, due_s)

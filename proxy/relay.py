"""Relay: one request from admission to its last byte, as a state machine.

No socket, no clock, no task: events in, writes out through two narrow ports (``ClientPort``, ``Network``).

    state       event                              next        effect
    ----------  ---------------------------------  ----------  -----------------------------------------------------
    NEW         start: Assigned                    AWAITING    message sent to the instance
    NEW         start: Queued                      QUEUED
    NEW         start: Rejected                    DONE        429 or 503
    QUEUED      decision: Assigned                 AWAITING    message sent
    QUEUED      decision: Rejected                 DONE        429 or 503
    QUEUED,     moved: Assigned                    AWAITING    link closed, message sent to the other instance
    AWAITING,
    HOLDING     moved: Rejected                    DONE        429 or 503
    AWAITING    head                               HOLDING
    HOLDING     stream, first event good           RELAYING    head and held events written; router: first token
    HOLDING     stream, first event an error < 500 DONE        that error, as a true HTTP error
    HOLDING     whole answer, status < 500         DONE        answer written; router: finished
    HOLDING     answer over the holding limit      RELAYING    head and what is held written
    AWAITING,   instance unreachable, broken, 5xx, AWAITING,   router: failed, routed again without that instance,
    HOLDING     5xx, 429 or an error event >= 500  QUEUED,     once; then the failure is the answer
                                                   DONE
    RELAYING    body                               RELAYING    whole events written
    RELAYING    end                                DONE        end written; router: finished
    RELAYING    instance broken                    DONE        error event, end, close; router: failed
    any of them client gone                        DONE        instance's connection closed; router: cancelled
    any of them deadline passed                    DONE        504, or error event; router: cancelled
    any of them shutdown                           DONE        503, or error event; router: cancelled
    DONE        anything                           DONE        nothing

Nothing is written before the first event, so until then another instance can serve; after it, nothing is tried again.
The answer's body is passed on as whole events (see ``proxy.sse``) or, where it is no stream, byte for byte.
"""

from enum import IntEnum
from typing import Protocol

import msgspec

from pools.request import Assigned, Decision, Queued, Rejected
from proxy import errors, wire
from proxy.admission import Admitted
from proxy.errors import ApiError
from proxy.heads import InstanceHead
from proxy.outcome import Outcome
from proxy.services import GatewayServices
from proxy.sse import EventFilter, Usage, error_status, first_event, usage_of, with_tier

_NO_HEAD = InstanceHead(0, ())
_NOBODY: frozenset[str] = frozenset()
_GAPS_AT_ONCE = 64  # arrival times kept before they are counted, and those of the second until somebody looks
_ATTEMPTS = 2


class State(IntEnum):
    """See the table in the module's docstring."""

    NEW = 0
    QUEUED = 1
    AWAITING = 2
    HOLDING = 3
    RELAYING = 4
    DONE = 5


_NEW, _QUEUED, _AWAITING, _HOLDING, _RELAYING, _DONE = State  # looking a member up takes longer than comparing it


class Failure(IntEnum):
    """How an attempt on an instance failed."""

    UNREACHABLE = 0
    BROKEN = 1


class ClientPort(Protocol):
    """The client's side of the connection."""

    chunked: bool  # false for HTTP/1.0: the end is the connection's
    keep_alive: bool

    def write(self, payload: bytes) -> None:
        """Send bytes."""

    def finish(self) -> None:
        """The answer is complete: next request, or close where ``keep_alive`` is false."""

    def abort(self) -> None:
        """Close without finishing: the answer must not look complete."""


class Link(Protocol):
    """A connection to an instance, busy with this request."""

    def abort(self) -> None:
        """Close it now, whatever it is doing; the relay hears nothing more."""

    def pause_reading(self) -> None:
        """Stop reading the answer."""

    def resume_reading(self) -> None:
        """Go on."""


class Network(Protocol):
    """Where connections and waiting requests are kept."""

    def send(self, instance_id: str, admitted: Admitted, relay: "Relay") -> Link | None:
        """Send the request to an instance; None where there is no such instance."""

    def wait(self, relay: "Relay") -> None:
        """A request is queued until the router releases it."""

    def waited(self) -> None:
        """A queued request is not queued any more."""

    def ended(self, outcome: Outcome) -> None:
        """A request is done: account for it, and let others go that may now."""


class Relay(msgspec.Struct, eq=False):
    """One request's way through the gateway; see the module's docstring."""

    _admitted: Admitted
    _client: ClientPort
    _network: Network
    _services: GatewayServices
    state: State = _NEW
    _link: Link | None = None
    _assigned: Assigned | None = None
    _excluded: frozenset[str] = _NOBODY
    _attempts: int = 0
    _answer_head: InstanceHead = _NO_HEAD
    _held: bytes = b""
    _events: EventFilter | None = None
    _usage: Usage | None = None
    _first_s: float | None = None
    _arrivals_s: list[float] = []  # of events whose gaps are not counted yet
    _chunks: int = 0  # events whose gaps are

    # What happens to the request

    def start(self, now_s: float) -> None:
        """The request is read and understood."""
        decision = self._services.router.route(self._admitted.request, now_s)
        if decision.__class__ is Assigned:  # mostly: no time to lose
            self._send(decision, now_s)
        else:
            self._decide(decision, now_s)

    def decision(self, decision: Assigned | Rejected, now_s: float) -> None:
        """The router released it from the queue."""
        if self._left_queue():
            self._decide(decision, now_s)

    def moved(self, decision: Assigned | Rejected, now_s: float) -> None:
        """The router takes it elsewhere, or gives it up, for it would be late where it is."""
        if _QUEUED <= self.state <= _HOLDING:
            if not self._left_queue():
                self._attempts -= 1  # it is no fault of the instance's
            self._close_link()
            self._held = b""
            self._decide(decision, now_s)

    def client_gone(self, now_s: float) -> None:
        """Its client closed the connection."""
        if self.state is not _DONE:
            self._close_link()
            self._services.router.on_cancelled(self._admitted.request.id, now_s)
            self._done(499, now_s, cancelled=True)

    def shutdown(self, now_s: float) -> None:
        """The grace is over."""
        if self.state is not _DONE:
            self._give_up(errors.shutting_down(), now_s)

    def check_deadlines(self, now_s: float) -> None:
        """Called about once a second."""
        if self.state is _DONE:
            return
        if len(self._arrivals_s) >= _GAPS_AT_ONCE:
            self._count_gaps()
        deadlines = self._services.settings.deadlines
        limit_s = deadlines.total_s if self.state is _RELAYING else deadlines.first_byte_s
        if now_s - self._admitted.request.arrival_s > limit_s:
            self._give_up(errors.late(limit_s), now_s)

    # What happens to its instance

    def head(self, head: InstanceHead) -> None:
        """The instance's status line and headers."""
        if self.state is _AWAITING:
            self.state = _HOLDING
            self._answer_head = head

    def body(self, payload: bytes, now_s: float) -> None:
        """Bytes of the instance's answer, without their framing."""
        if self.state is _RELAYING:
            events = self._events
            if events is not None:
                self._arrivals_s.append(now_s)
                payload = events.feed(payload)
                if not payload:
                    return
            client = self._client
            client.write(b"%x\r\n%b\r\n" % (len(payload), payload) if client.chunked else payload)
        elif self.state is _HOLDING:
            self._held = self._held + payload if self._held else payload
            if self._answer_head.stream:
                self._inspect(now_s)
            elif len(self._held) > self._services.settings.limits.held_bytes:
                self._commit(now_s)

    def end(self, now_s: float) -> None:
        """The instance's answer is complete."""
        self._link = None
        if self.state is _HOLDING:
            self._end_held(now_s)
        elif self.state is _RELAYING:
            self._end_relayed(now_s)

    def broken(self, failure: Failure, now_s: float) -> None:
        """The instance could not be reached, closed the connection, or did not speak HTTP."""
        self._link = None
        if self.state is _RELAYING:
            self._die(errors.broken(), failure.name.lower(), now_s)
        elif self.state is not _DONE:
            error = errors.unreachable() if failure is Failure.UNREACHABLE else errors.broken()
            self._try_elsewhere(error, failure.name.lower(), now_s)

    # What the client's socket can take

    def pause(self) -> None:
        """The client reads slower than the instance writes."""
        if self._link is not None:
            self._link.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        if self._link is not None:
            self._link.resume_reading()

    # Routing

    def _left_queue(self) -> bool:
        if self.state is not _QUEUED:
            return False
        self.state = _NEW
        self._network.waited()
        return True

    def _decide(self, decision: Decision, now_s: float) -> None:
        if isinstance(decision, Assigned):
            self._send(decision, now_s)
        elif isinstance(decision, Queued):
            self.state = _QUEUED
            self._network.wait(self)
        else:
            self._services.metrics.dropped.add((decision.reason.value,))
            self._answer_error(errors.rejected(decision), now_s)

    def _send(self, assigned: Assigned, now_s: float) -> None:
        self.state = _AWAITING
        self._assigned = assigned
        self._attempts += 1
        link = self._link = self._network.send(assigned.instance_id, self._admitted, self)
        if link is None:
            self.broken(Failure.UNREACHABLE, now_s)

    def _try_elsewhere(self, error: ApiError, kind: str, now_s: float) -> None:
        """The attempt failed before the client saw a byte: once more, or answer with the failure."""
        services, request = self._services, self._admitted.request
        instance_id = self._failed(kind, now_s)
        self._held = b""
        if self._attempts < _ATTEMPTS:
            self._excluded |= {instance_id}
            decision = services.router.route(request, now_s, self._excluded)
            if not isinstance(decision, Rejected):
                services.metrics.retries.add((self._assigned.pool if self._assigned else "",))
                self._decide(decision, now_s)
                return
        if error.reason is not None:
            services.metrics.dropped.add((error.reason,))
        self._answer_error(error, now_s)

    def _failed(self, kind: str, now_s: float) -> str:
        instance_id = self._assigned.instance_id if self._assigned else ""
        self._services.metrics.failures.add((instance_id, kind))
        self._services.router.on_failed(self._admitted.request.id, instance_id, now_s)
        return instance_id

    # Holding: nothing has been written yet

    def _inspect(self, now_s: float) -> None:
        data = first_event(self._held)
        if data is None:
            if len(self._held) > self._services.settings.limits.held_bytes:
                self._commit(now_s)
            return
        status = error_status(data)
        if status is None:
            self._commit(now_s)
            return
        self._close_link()
        self._refused(status, data, now_s)

    def _refused(self, status: int, body: bytes, now_s: float) -> None:
        """The instance answered with an error: its own fault (try elsewhere) or the request's."""
        error = errors.of_engine(status, body)
        if status >= 500 or status == 429:
            self._try_elsewhere(error, f"status-{status}", now_s)
            return
        self._services.router.on_finished(self._admitted.request.id, 0, now_s)
        self._answer_error(error, now_s)

    def _commit(self, now_s: float) -> None:
        """Write the head and what is held; from here on there is no way back."""
        self.state = _RELAYING
        client, held = self._client, self._held
        self._held = b""
        if self._answer_head.stream:
            self._first_s = now_s
            self._arrivals_s.append(now_s)
            self._services.router.on_first_token(self._admitted.request.id, now_s)
            admitted, told = self._admitted, self._admitted.fields.include_energy
            self._events = EventFilter(
                admitted.usage_injected and not told, admitted.tier, self._energy_of if told else None
            )
            held = self._events.feed(held)
        if not client.chunked:
            client.keep_alive = False
        head = self._head(wire.CHUNKED if client.chunked else b"")
        client.write(head + (wire.chunk(held) if client.chunked and held else held))

    def _energy_of(self, usage: Usage) -> float | None:
        """What the request took, now that its tokens are counted."""
        if self._services.energy_j is None:
            return None
        self._usage = usage
        return self._services.energy_j(self._outcome(self._answer_head.status, self._services.clock(), cancelled=False))

    def _end_held(self, now_s: float) -> None:
        """A whole answer, or a stream that ended before its first event."""
        if self._answer_head.status >= 400:
            self._refused(self._answer_head.status, self._held, now_s)
            return
        if self._answer_head.stream:
            self._try_elsewhere(errors.broken("The instance ended the stream before its first event"), "empty", now_s)
            return
        body, admitted, services, head = self._held, self._admitted, self._services, self._answer_head
        usage = self._usage = usage_of(body)
        self._first_s = now_s
        if admitted.tier is not None:
            body = with_tier(body, admitted.tier)
        services.router.on_finished(admitted.request.id, (usage.completion_tokens or 0) if usage else 0, now_s)
        outcome = self._outcome(head.status, now_s, cancelled=False)
        energy_j = services.energy_j(outcome) if services.energy_j is not None else None
        self._client.write(
            b"%b%b%bcontent-length: %d\r\n%b%b"
            % (
                head.lines,
                self._own_lines(),
                b"" if energy_j is None else b"x-dynamollm-energy-mj: %d\r\n" % round(energy_j * 1000),
                len(body),
                b"\r\n" if self._client.keep_alive else wire.CLOSE_AND_BLANK,
                body,
            )
        )
        self._ended(outcome)

    # Relaying: the client has seen bytes

    def _end_relayed(self, now_s: float) -> None:
        events = self._events
        rest = b""
        if events is not None:
            rest = events.rest()
            self._usage = events.usage
        if self._client.chunked:
            self._client.write((wire.chunk(rest) if rest else b"") + wire.LAST_CHUNK)
        elif rest:
            self._client.write(rest)
        self._services.router.on_finished(self._admitted.request.id, self._output_tokens(), now_s)
        self._done(self._answer_head.status, now_s)

    def _die(self, error: ApiError, kind: str, now_s: float) -> None:
        """The instance died in the middle."""
        self._failed(kind, now_s)
        self._tell_in_stream(error)
        self._done(error.status, now_s)

    def _tell_in_stream(self, error: ApiError) -> None:
        """A stream ends with an error event; any other body is cut off, so that it cannot look whole."""
        client = self._client
        client.keep_alive = False
        if self._events is None:
            client.abort()
        elif client.chunked:
            client.write(wire.chunk(error.event()) + wire.LAST_CHUNK)
        else:
            client.write(error.event())

    def _give_up(self, error: ApiError, now_s: float) -> None:
        """A deadline or the shutdown ends it, wherever it is."""
        self._close_link()
        self._services.router.on_cancelled(self._admitted.request.id, now_s)
        if self.state is _RELAYING:
            self._tell_in_stream(error)
            self._done(error.status, now_s)
        else:
            if error.reason is not None:
                self._services.metrics.dropped.add((error.reason,))
            self._answer_error(error, now_s)

    # The end

    def _answer_error(self, error: ApiError, now_s: float) -> None:
        self._client.write(wire.error_answer(error, self._own_lines(), self._client.keep_alive))
        self._done(error.status, now_s)

    def _done(self, status: int, now_s: float, cancelled: bool = False) -> None:
        self._left_queue()
        if self._events is not None:
            self._usage = self._events.usage
        if self._arrivals_s:
            self._count_gaps()
        self._ended(self._outcome(status, now_s, cancelled))

    def _ended(self, outcome: Outcome) -> None:
        self.state = _DONE
        self._network.ended(outcome)
        if not outcome.cancelled:
            self._client.finish()

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    def _outcome(self, status: int, now_s: float, cancelled: bool) -> Outcome:
        usage, assigned, admitted = self._usage, self._assigned, self._admitted
        return Outcome(
            admitted.request,
            admitted.fields,
            status,
            assigned.instance_id if assigned else None,
            assigned.pool if assigned else None,
            now_s,
            self._first_s,
            usage.prompt_tokens if usage else None,
            usage.completion_tokens if usage else None,
            cancelled,
            self._answer_head.stream,
        )

    def _output_tokens(self) -> int:
        """As the engine counted; where it did not, one an event."""
        if self._usage is not None and self._usage.completion_tokens is not None:
            return self._usage.completion_tokens
        return self._chunks + len(self._arrivals_s)

    def _count_gaps(self) -> None:
        """Gaps between arrivals into the histogram, many at a time; the last arrival begins the next ones."""
        arrivals_s = self._arrivals_s
        request, assigned = self._admitted.request, self._assigned
        labels = (request.model, request.request_class.name, assigned.pool if assigned else "")
        self._services.metrics.tbt.observe_gaps(labels, arrivals_s)
        self._chunks += len(arrivals_s) - 1
        del arrivals_s[:-1]

    # Heads

    def _head(self, framing: bytes) -> bytes:
        end = b"\r\n" if self._client.keep_alive else wire.CLOSE_AND_BLANK
        return b"".join((self._answer_head.lines, framing, self._own_lines(), end))

    def _own_lines(self) -> bytes:
        lines, assigned = self._admitted.own_lines, self._assigned
        return lines if assigned is None else lines + wire.placed_lines(assigned.pool, assigned.instance_id)

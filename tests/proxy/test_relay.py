"""The relay's state machine under every order of events, with ports that only record."""

import json

from gateway_fakes import CHAT, DONE, TOKENS, WHOLE, ByteCounter, CapLengths, PlainDirectory, PlainRouter, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from pools.request import Assigned, Queued, Rejected, RejectReason
from proxy.admission import Admission
from proxy.fields import CHAT_PATH
from proxy.heads import InstanceHead
from proxy.metrics import GatewayMetrics
from proxy.relay import Failure, Relay, State
from proxy.services import GatewayServices

STREAM_HEAD = InstanceHead(200, ((b"content-type", b"text/event-stream"),))
WHOLE_HEAD = InstanceHead(200, ((b"content-type", b"application/json"),))
ERROR_HEAD = InstanceHead(503, ())
REFUSAL_HEAD = InstanceHead(400, ())


class Client:
    """Records; fails the test where a relay breaks the port's contract."""

    def __init__(self, chunked=True):
        self.chunked = chunked
        self.keep_alive = True
        self.written = b""
        self.ends = []

    def write(self, payload):
        assert not self.ends, "written after the end"
        assert payload, "an empty write"
        self.written += payload

    def finish(self):
        self.ends.append("finished")

    def abort(self):
        self.ends.append("aborted")


class Link:
    def __init__(self):
        self.open = True
        self.paused = False

    def abort(self):
        assert self.open, "aborted twice, or after its end"
        self.open = False

    def pause_reading(self):
        assert self.open
        self.paused = True

    def resume_reading(self):
        assert self.open
        self.paused = False


class Network:
    def __init__(self, unknown=()):
        self.unknown = unknown
        self.links = []
        self.sent_to = []
        self.waiting = 0
        self.outcomes = []

    def send(self, instance_id, admitted, relay):
        self.sent_to.append(instance_id)
        if instance_id in self.unknown:
            return None
        self.links.append(Link())
        return self.links[-1]

    def wait(self, relay):
        self.waiting += 1

    def waited(self):
        self.waiting -= 1

    def ended(self, outcome):
        self.outcomes.append(outcome)

    @property
    def link(self):
        return self.links[-1]


class DecidedRouter(PlainRouter):
    """Gives the decisions it was told to give, then assigns."""

    def __init__(self, *decisions):
        super().__init__("i0", "i1", "i2")
        self.decisions = list(decisions)

    def route(self, request, now_s, exclude=frozenset()):
        self.routed.append(exclude)
        if self.decisions:
            return self.decisions.pop(0)
        return Assigned(next(i for i in self.instances if i not in exclude), "LL")


REJECTED = Rejected(RejectReason.SATURATED, contended=True, retry_after_s=1.0)


def relay_of(fields, *decisions, chunked=True, unknown=(), energy_j=None):
    services = GatewayServices(
        router=DecidedRouter(*decisions),
        directory=PlainDirectory(),
        tokens=ByteCounter(),
        lengths=CapLengths(),
        metrics=GatewayMetrics(),
        clock=lambda: 0.0,
        energy_j=energy_j,
    )
    admission = Admission(services)
    admitted = admission.admit(CHAT_PATH, admission.read_head(()), json.dumps(fields).encode(), "req-1", 0.0)
    client, network = Client(chunked), Network(unknown)
    return Relay(admitted, client, network, services), client, network, services.router, network.outcomes


def test_a_rejection_says_when_to_come_back():
    relay, client, network, router, _ = relay_of(CHAT, REJECTED)
    relay.start(0.0)
    got = parse(client.written)
    assert (got.status, got.headers["retry-after"]) == (429, "1")
    assert (relay.state, client.ends, network.sent_to, router.told) == (State.DONE, ["finished"], [], [])


def test_queued_then_assigned():
    relay, _, network, _, _ = relay_of(CHAT, Queued(1))
    relay.start(0.0)
    assert (relay.state, network.waiting) == (State.QUEUED, 1)
    relay.decision(Assigned("i2", "LL"), 1.0)
    assert (relay.state, network.waiting, network.sent_to) == (State.AWAITING, 0, ["i2"])


def test_first_token_is_told_once_with_the_first_event():
    relay, _, _, router, outcomes = relay_of({**CHAT, "stream": True})
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    relay.body(TOKENS[0][:10], 1.0)
    assert not router.told
    relay.body(TOKENS[0][10:], 2.0)
    relay.body(TOKENS[1], 3.0)
    assert router.told == [("first", "req-1")]
    relay.body(DONE, 4.0)
    relay.end(5.0)
    assert router.ends() == ["finished"]
    assert (outcomes[0].first_token_s, outcomes[0].ended_s) == (2.0, 5.0)


def test_gaps_between_events_are_counted_each_once_however_many():
    relay, _, _, _, _ = relay_of({**CHAT, "stream": True})
    metrics = relay._services.metrics
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    for n in range(2000):
        relay.body(TOKENS[1], n * 0.02)
    relay.end(40.0)
    labels = ("tiny", "SS", "LL")
    assert metrics.tbt.count(labels) == 1999
    assert relay._output_tokens() == 2000  # no usage: one an event


def test_gaps_of_a_long_stream_are_counted_while_it_runs():
    relay, _, _, _, _ = relay_of({**CHAT, "stream": True})
    metrics, labels = relay._services.metrics, ("tiny", "SS", "LL")
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    for n in range(1000):
        relay.body(TOKENS[1], n * 0.02)
        if n % 50 == 49:  # about once a second
            relay.check_deadlines(n * 0.02)
            assert len(relay._arrivals_s) < 50 + 64
    assert metrics.tbt.count(labels) > 1000 - 50 - 64
    relay.end(20.0)
    assert metrics.tbt.count(labels) == 999
    assert relay._output_tokens() == 1000


def test_no_such_instance_is_a_failure_like_any_other():
    relay, client, network, router, _ = relay_of(CHAT, unknown=("i0",))
    relay.start(0.0)
    assert network.sent_to == ["i0", "i1"]
    assert router.ends() == ["failed"]
    relay.head(WHOLE_HEAD)
    relay.body(WHOLE, 1.0)
    relay.end(1.0)
    assert parse(client.written).body == WHOLE


def test_moved_before_the_first_event_is_no_failure_and_keeps_its_second_try():
    relay, client, network, router, _ = relay_of({**CHAT, "stream": True})
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    relay.body(TOKENS[0][:10], 0.5)
    first = network.link
    relay.moved(Assigned("i1", "LL"), 1.0)
    assert not first.open
    assert router.ends() == []
    relay.broken(Failure.BROKEN, 2.0)
    assert network.sent_to == ["i0", "i1", "i0"]
    relay.head(STREAM_HEAD)
    relay.body(TOKENS[0], 3.0)
    relay.moved(Assigned("i2", "LL"), 4.0)  # too late: the client has seen it
    assert network.sent_to == ["i0", "i1", "i0"]
    assert network.link.open
    relay.end(5.0)
    assert parse(client.written).body == TOKENS[0]


def test_moved_from_the_queue_or_given_up():
    relay, client, network, _, _ = relay_of(CHAT, Queued(1))
    relay.start(0.0)
    relay.moved(REJECTED, 1.0)
    assert (parse(client.written).status, network.waiting) == (429, 0)


def test_back_pressure_reaches_the_present_link_only():
    relay, _, network, _, _ = relay_of({**CHAT, "stream": True}, Queued(1))
    relay.pause()
    relay.start(0.0)
    relay.resume()
    relay.decision(Assigned("i0", "LL"), 0.0)
    relay.pause()
    assert network.link.paused
    relay.resume()
    assert not network.link.paused


def test_an_endless_first_event_is_let_through():
    relay, client, _, _, _ = relay_of({**CHAT, "stream": True})
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    for _ in range(3):
        relay.body(b"data: " + b"x" * 2**19, 1.0)
    assert relay.state is State.RELAYING
    relay.end(2.0)
    assert len(parse(client.written).body) == 3 * (2**19 + 6)


def test_http_1_0_errors_in_the_stream_come_bare():
    relay, client, _, _, _ = relay_of({**CHAT, "stream": True}, chunked=False)
    relay.start(0.0)
    relay.head(STREAM_HEAD)
    relay.body(TOKENS[0], 1.0)
    relay.broken(Failure.BROKEN, 2.0)
    assert client.written.partition(b"\r\n\r\n")[2].startswith(TOKENS[0] + b'data: {"error"')
    assert not client.keep_alive


def test_what_is_held_at_a_good_end_is_passed_on_in_both_framings():
    for chunked in (True, False):
        relay, client, _, _, _ = relay_of({**CHAT, "stream": True}, chunked=chunked)
        relay.start(0.0)
        relay.head(STREAM_HEAD)
        relay.body(TOKENS[0] + b"data: [DONE]", 1.0)
        relay.end(2.0)
        body = parse(client.written).body if chunked else client.written.partition(b"\r\n\r\n")[2]
        assert body == TOKENS[0] + b"data: [DONE]"


# Every order of events

PIECES = (*TOKENS, DONE, TOKENS[0][:7], b"\n\n", WHOLE, b'data: {"error":{"message":"m","code":503}}\n\n', b": hm\n\n")
EVENTS = st.one_of(
    st.sampled_from([STREAM_HEAD, WHOLE_HEAD, ERROR_HEAD, REFUSAL_HEAD]).map(lambda head: ("head", head)),
    st.sampled_from(PIECES).map(lambda piece: ("body", piece)),
    st.just(("end", None)),
    st.sampled_from(Failure).map(lambda failure: ("broken", failure)),
    st.sampled_from([Assigned("i2", "LL"), REJECTED]).map(lambda decision: ("decision", decision)),
    st.sampled_from([Assigned("i2", "LL"), REJECTED]).map(lambda decision: ("moved", decision)),
    st.sampled_from(["client_gone", "shutdown", "pause", "resume", "late"]).map(lambda name: (name, None)),
)


def feed(relay, network, event, value, now_s):
    """An event, where the contract of the ports allows it: a link that is gone says nothing any more."""
    linked = bool(network.links) and network.link.open and relay._link is network.link
    if event == "head" and linked:
        relay.head(value)
    elif event == "body" and linked and relay.state >= State.HOLDING:
        relay.body(value, now_s)
    elif event == "end" and linked and relay.state >= State.HOLDING:
        network.link.open = False
        relay.end(now_s)
    elif event == "broken" and linked:
        network.link.open = False
        relay.broken(value, now_s)
    elif event in ("decision", "moved"):
        getattr(relay, event)(value, now_s)
    elif event in ("client_gone", "shutdown"):
        getattr(relay, event)(now_s)
    elif event in ("pause", "resume"):
        getattr(relay, event)()
    elif event == "late":
        relay.check_deadlines(1e6)


@settings(max_examples=400, deadline=None)
@given(
    events=st.lists(EVENTS, max_size=25),
    decisions=st.lists(st.sampled_from([Assigned("i0", "LL"), Queued(1), REJECTED]), max_size=3),
    stream=st.booleans(),
    chunked=st.booleans(),
)
def test_whatever_happens(events, decisions, stream, chunked):
    relay, client, network, router, outcomes = relay_of({**CHAT, "stream": stream}, *decisions, chunked=chunked)
    relay.start(0.0)
    seen_committed = False
    for now_s, (event, value) in enumerate(events):
        before, written = relay.state, client.written
        feed(relay, network, event, value, float(now_s))
        if before is State.DONE:
            assert (relay.state, client.written) == (State.DONE, written)
        if seen_committed:
            assert relay.state in (State.RELAYING, State.DONE)  # no way back
        seen_committed = seen_committed or relay.state is State.RELAYING
        if relay.state < State.RELAYING:
            assert client.written == b""  # nothing before the commitment
        assert sum(link.open for link in network.links) <= 1
        assert network.waiting == (relay.state is State.QUEUED)
    gone = relay.state is not State.DONE
    if gone:
        relay.client_gone(99.0)
    assert relay.state is State.DONE
    assert not any(link.open for link in network.links)  # every instance released
    assert len(outcomes) == 1
    assert client.ends in ([[]] if outcomes[0].cancelled else [["finished"], ["aborted", "finished"]])
    assert router.told.count(("first", "req-1")) <= 1
    assert router.ends().count("finished") + router.ends().count("cancelled") <= 1
    if not chunked:
        return
    if not outcomes[0].cancelled and "aborted" not in client.ends:
        assert parse(client.written).complete  # what was answered is a whole HTTP message
    if client.written:
        assert parse(client.written).status >= 200

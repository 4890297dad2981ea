"""Connections to instances on transports that only record: the corners that sockets seldom show."""

import asyncio

import pytest
from gateway_fakes import STREAM_HEAD, TOKENS, WHOLE, Clock, answer, chunk, play

from proxy.relay import Failure
from proxy.services import Address
from proxy.settings import Limits, ProxySettings
from proxy.upstream import Connection, ConnectionPool, Phase

HERE = Address("127.0.0.1", 1, b"engine")


class Transport(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.written = []
        self.calls = []
        self.closing = False
        self.unsent = 0

    def write(self, data):
        self.written.append(data)

    def abort(self):
        self.closing = True

    def is_closing(self):
        return self.closing

    def get_write_buffer_size(self):
        return self.unsent

    def pause_reading(self):
        self.calls.append("pause")

    def resume_reading(self):
        self.calls.append("resume")


class Listener:
    """Stands where a relay would."""

    def __init__(self):
        self.heard = []

    def head(self, head):
        self.heard.append(("head", head.status))

    def body(self, payload, now_s):
        self.heard.append(("body", payload))

    def end(self, now_s):
        self.heard.append(("end",))

    def broken(self, failure, now_s):
        self.heard.append(("broken", failure))


def connected(limits=None):
    """A pool, a listener, and a connection that carries its request."""
    pool = ConnectionPool(ProxySettings(limits=limits or Limits()), Clock())
    listener, transport = Listener(), Transport()
    connection = pool.send(HERE, b"request", listener)
    connection._dial.cancel()
    connection.connection_made(transport)
    return pool, connection, listener, transport


def inside_loop(test):
    async def scenario():
        test()

    return lambda: play(scenario)


@inside_loop
def test_one_answer_and_back_to_the_idle_ones():
    pool, connection, listener, transport = connected()
    connection.data_received(answer(200, WHOLE))
    assert transport.written == [b"request"]
    assert listener.heard == [("head", 200), ("body", WHOLE), ("end",)]
    assert connection.phase is Phase.IDLE
    again = Listener()
    assert pool.send(HERE, b"second", again) is connection
    assert transport.written == [b"request", b"second"]


@inside_loop
def test_several_pieces_in_one_segment_are_told_at_once():
    _, connection, listener, _ = connected()
    connection.data_received(STREAM_HEAD)
    connection.data_received(b"".join(map(chunk, TOKENS)))
    assert listener.heard == [("head", 200), ("body", b"".join(TOKENS))]


@inside_loop
def test_an_answer_before_the_whole_request_was_sent_ends_the_connection():
    """What is still unsent would be read as the next request."""
    pool, connection, listener, transport = connected()
    transport.unsent = 10
    connection.data_received(answer(413, b"{}"))
    assert listener.heard[-1] == ("end",)
    assert transport.closing
    assert pool.open_connections == 0


@inside_loop
def test_given_up_while_dialling_then_connected_after_all():
    pool = ConnectionPool(ProxySettings(), Clock())
    connection = pool.send(HERE, b"request", Listener())
    connection.abort()
    transport = Transport()
    connection.connection_made(transport)
    assert (transport.closing, transport.written) == (True, [])
    assert pool.open_connections == 0


@inside_loop
def test_a_relay_that_turned_away_hears_nothing_more():
    pool, connection, listener, transport = connected()
    connection.data_received(STREAM_HEAD)
    connection.abort()
    connection.data_received(chunk(TOKENS[0]))
    connection.connection_lost(None)
    assert listener.heard == [("head", 200)]
    assert transport.closing
    assert pool.open_connections == 0


@inside_loop
def test_a_relay_may_turn_away_at_the_first_piece():
    """An error as first event: the rest of that segment, the end included, is nobody's."""
    _, connection, listener, transport = connected()
    listener.body = lambda payload, now_s: connection.abort()
    connection.data_received(STREAM_HEAD + chunk(b'data: {"error":{}}\n\n') + b"0\r\n\r\n")
    assert listener.heard == [("head", 200)]
    assert transport.closing


@inside_loop
def test_reading_is_paused_only_while_there_is_a_connection():
    pool, connection, _, transport = connected()
    connection.pause_reading()
    connection.resume_reading()
    assert transport.calls == ["pause", "resume"]
    transport.closing = True
    connection.pause_reading()
    connection.resume_reading()
    assert transport.calls == ["pause", "resume"]
    dialling = Connection(pool, HERE)
    dialling.pause_reading()
    dialling.resume_reading()


@inside_loop
def test_a_closing_connection_is_not_used_again():
    pool, connection, _, transport = connected()
    connection.data_received(answer(200, WHOLE))
    transport.closing = True
    other = pool.send(HERE, b"second", Listener())
    assert other is not connection
    other.abort()


@inside_loop
def test_stale_only_where_nothing_came():
    """A used connection that dies in the middle of an answer is broken, not stale."""
    _, connection, _, _ = connected()
    connection.data_received(answer(200, WHOLE))
    second = Listener()
    connection.carry(b"second", second)
    connection.data_received(b"HTTP/1.1 200 OK\r\n")
    connection.connection_lost(None)
    assert second.heard == [("broken", Failure.BROKEN)]


@inside_loop
def test_answers_without_a_body():
    for status in (204, 304):
        _, connection, listener, _ = connected()
        connection.data_received(b"HTTP/1.1 %d X\r\n\r\n" % status)
        assert listener.heard == [("head", status), ("end",)]
        assert connection.phase is Phase.IDLE


@inside_loop
def test_the_limit_is_of_each_instance():
    pool, connection, _, _ = connected(Limits(upstream_connections=1))
    assert pool.send(HERE, b"request", Listener()) is None
    elsewhere = pool.send(Address("127.0.0.1", 2, b"other"), b"request", Listener())
    assert elsewhere is not None
    assert pool.open_connections == 2
    connection.data_received(answer(200, WHOLE))
    pool.close()
    assert pool.open_connections == 1  # the busy one
    elsewhere.abort()


@inside_loop
def test_a_fault_of_the_relay_breaks_its_own_request_only():
    _, connection, listener, transport = connected()

    def faulty(head):
        raise RuntimeError("a bug")

    listener.head = faulty
    with pytest.raises(RuntimeError, match="a bug"):
        connection.data_received(answer(200, WHOLE))
    assert listener.heard == [("broken", Failure.BROKEN)]
    assert transport.closing

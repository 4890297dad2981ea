"""The emulated server over real sockets: streams, clients that leave, queue limits, sleep, death."""

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import chat_body

LONG = {"max_tokens": 4000, "stream": True}


def events_of(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def wait_for(condition, within_s: float = 5.0) -> float:
    """Poll until it holds; how long that took."""
    begun_s = time.monotonic()
    while not condition():
        if time.monotonic() - begun_s > within_s:
            raise AssertionError("it did not come to pass")
        threading.Event().wait(0.002)
    return time.monotonic() - begun_s


def running(instance) -> float:
    return instance.metric("vllm:num_requests_running") + instance.metric("vllm:num_requests_waiting")


def raw_post(body: dict, *, version: str = "1.1", headers: str = "") -> bytes:
    """Bytes of a chat request."""
    content = json.dumps(body).encode()
    lines = [f"POST /v1/chat/completions HTTP/{version}", "host: x", "content-type: application/json"]
    return "\r\n".join([*lines, f"{headers}content-length: {len(content)}", "", ""]).encode() + content


@contextmanager
def raw_request(instance, **fields):
    """A socket on which a request has been sent, and nothing read."""
    address = urlsplit(instance.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(raw_post(chat_body(**fields)))
        wait_for(lambda: running(instance) > 0)
        yield connection


class TestStreams:
    def test_headers_come_while_the_request_waits(self, instance):
        instance.change("faults", faults={"hang": True})
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            assert answer.status_code == 200
            assert running(instance) == 1
            instance.change("faults", faults={})
            assert events_of(answer.read().decode())[-1] == "[DONE]"

    def test_a_stream_of_many_tokens_is_complete(self, instance):
        answer = instance.chat(max_tokens=400, stream=True, stream_options={"include_usage": True})
        *chunks, usage, done = events_of(answer.text)
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 400
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["choices"][0]["finish_reason"] for c in chunks[1:]] == [None] * (len(chunks) - 2) + ["length"]
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert len(text.split()) == 400

    def test_the_same_request_says_the_same_whole_and_streamed(self, instance):
        whole = instance.chat(max_tokens=30, seed=7).json()["choices"][0]["message"]["content"]
        streamed = events_of(instance.chat(max_tokens=30, seed=7, stream=True).text)[:-1]
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in streamed) == whole

    def test_chunks_may_merge_tokens(self, instance):
        instance.change("faults", faults={"tokens_per_chunk": 8})
        answer = instance.chat(max_tokens=80, stream=True, stream_options={"include_usage": True})
        *chunks, usage, _ = events_of(answer.text)
        assert usage["usage"]["completion_tokens"] == 80
        assert len(chunks) < 20
        assert len("".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks).split()) == 80

    def test_http_1_0_gets_a_stream_without_chunks(self, instance):
        address = urlsplit(instance.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(raw_post(chat_body(stream=True), version="1.0"))
            received = b""
            while piece := connection.recv(65536):
                received += piece
        assert received.endswith(b"data: [DONE]\n\n")
        assert b"transfer-encoding" not in received

    def test_requests_sent_ahead_are_answered_in_order(self, instance):
        address = urlsplit(instance.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(
                raw_post(chat_body(max_tokens=20)) + b"GET /version HTTP/1.1\r\nconnection: close\r\n\r\n"
            )
            received = b""
            while piece := connection.recv(65536):
                received += piece
        assert received.index(b"chat.completion") < received.index(b'{"version":')

    def test_a_large_body_that_asks_for_leave(self, instance):
        address = urlsplit(instance.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nexpect: 100-continue\r\ncontent-type: application/json\r\n")
            connection.sendall(b"content-length: 17\r\nconnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
            connection.sendall(b'{"prompt":"word"}')
            assert b'"count":1' in connection.recv(4096)

    def test_nonsense_is_refused(self, instance):
        address = urlsplit(instance.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"\x16\x03\x01 what\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")

    def test_the_request_id_comes_back(self, instance):
        answer = instance.http.post("/v1/chat/completions", json=chat_body(), headers={"x-request-id": "abc"})
        assert (answer.headers["x-request-id"], answer.json()["id"]) == ("abc", "chatcmpl-abc")


class TestClientsThatLeave:
    """The engine is free within 100 ms, in the quickest of a few tries: the machine may be busy with other things."""

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("how", ["close", "reset", "half-close"])
    def test_leaving_aborts(self, instance, how, stream):
        took_s = [self.leave(instance, how, stream) for _ in range(3)]
        assert min(took_s) < 0.1
        assert instance.metric("vllm:kv_cache_usage_perc") == 0
        assert instance.metric("vllm:request_success_total") == 0  # no counter records it
        assert instance.chat().status_code == 200

    def leave(self, instance, how, stream):
        with raw_request(instance, max_tokens=4000, stream=stream) as connection:
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if how == "half-close":
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.close()
            return wait_for(lambda: running(instance) == 0)

    def test_leaving_frees_a_place_in_the_queue(self, emulator):
        instance = emulator.start(max_num_queued_reqs=1)
        with raw_request(instance, **LONG):
            assert instance.chat().status_code == 503
        wait_for(lambda: running(instance) == 0)
        assert instance.chat().status_code == 200


class TestQueueLimit:
    def test_a_full_queue_is_a_503_without_retry_after(self, emulator):
        instance = emulator.start(max_num_queued_reqs=1)
        with raw_request(instance, **LONG):
            answer = instance.chat()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == 503
            assert "retry-after" not in answer.headers
        assert instance.metric("vllm:admission_rejections_total") == 1

    def test_in_a_burst_the_queue_is_found_full_within_the_stream(self, emulator):
        instance = emulator.start(max_num_queued_reqs=1)
        address = urlsplit(instance.url)
        request = raw_post(chat_body(stream=True, max_tokens=50), headers="connection: close\r\n")
        connections = [socket.create_connection((address.hostname, address.port)) for _ in range(12)]
        for connection in connections:
            connection.sendall(request)
        answers = [b"".join(iter(lambda c=c: c.recv(65536), b"")) for c in connections]
        for connection in connections:
            connection.close()
        assert sum(b'"finish_reason":"length"' in answer for answer in answers) >= 1
        refused = [answer for answer in answers if b'"finish_reason":"length"' not in answer]
        assert refused
        for answer in refused:  # either at the door, or inside: then 200, the event and the end
            if answer.startswith(b"HTTP/1.1 200"):
                assert b'data: {"error": {"message"' in answer
                assert b'"code": 503}}\n\n' in answer
                assert b"data: [DONE]" in answer
            else:
                assert answer.startswith(b"HTTP/1.1 503")

    def test_priority_goes_first_where_the_policy_says_so(self, emulator):
        instance = emulator.start(scheduling_policy="priority", max_num_seqs=1)
        instance.change("faults", faults={"hang": True})
        order = []

        def ask(priority: int) -> None:
            instance.http.post("/v1/chat/completions", json=chat_body(priority=priority, max_tokens=2))
            order.append(priority)

        threads = []
        for number, priority in enumerate((0, 5, -5, 1)):
            threads.append(threading.Thread(target=ask, args=(priority,)))
            threads[-1].start()
            wait_for(lambda number=number: running(instance) == number + 1)
        instance.change("faults", faults={"slow_factor": 50.0})
        for thread in threads:
            thread.join(10)
        assert order == [-5, 0, 1, 5]


class TestSleepAndPause:
    def test_asleep_requests_hang_while_health_is_fine(self, instance):
        assert instance.http.post("/sleep?level=1").json() == {"status": "sleeping", "level": 1}
        assert instance.http.get("/health").status_code == 200
        assert instance.http.get("/is_sleeping").json() == {"is_sleeping": True}
        metrics = instance.http.get("/metrics").text
        assert 'sleep_state="awake"} 0.0' in metrics
        assert 'sleep_state="weights_offloaded"} 1.0' in metrics
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as answer:
            assert answer.status_code == 200
            assert instance.metric("vllm:num_requests_waiting") == 1
            assert instance.http.post("/wake_up").json() == {"status": "awake", "tags": None}
            assert events_of(answer.read().decode())[-1] == "[DONE]"
        assert instance.http.get("/is_sleeping").json() == {"is_sleeping": False}

    def test_sleeping_aborts_what_runs(self, instance):
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(**LONG)) as answer:
            wait_for(lambda: instance.metric("vllm:num_requests_running") == 1)
            instance.http.post("/sleep")
            *_, last, done = events_of(answer.read().decode())
        assert last["choices"][0]["finish_reason"] == "abort"
        assert done == "[DONE]"

    def test_pausing_with_keep_goes_on_later(self, instance):
        with instance.http.stream(
            "POST", "/v1/chat/completions", json=chat_body(max_tokens=200, stream=True)
        ) as answer:
            instance.http.post("/pause?mode=keep")
            assert instance.http.get("/is_paused").json() == {"is_paused": True}
            assert running(instance) == 1
            instance.http.post("/resume")
            *_, last, _ = events_of(answer.read().decode())
        assert last["choices"][0]["finish_reason"] == "length"

    def test_pausing_with_wait_answers_when_all_is_done(self, instance):
        with raw_request(instance, max_tokens=300, stream=False) as connection:
            instance.http.post("/pause?mode=wait")
            assert running(instance) == 0
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")

    def test_an_unknown_mode_is_refused(self, instance):
        assert instance.http.post("/pause?mode=later").status_code == 400
        assert instance.http.post("/sleep?level=3").status_code == 400


class TestLifeAndDeath:
    def test_the_port_refuses_while_weights_load(self, emulator):
        described = emulator.ask(startup_s=30.0).json()
        assert described["state"] == "starting"
        with pytest.raises(httpx.ConnectError):
            httpx.get(described["url"] + "/health")

    def test_draining_finishes_what_runs_and_refuses_what_comes(self, instance):
        with instance.http.stream(
            "POST", "/v1/chat/completions", json=chat_body(max_tokens=1000, stream=True)
        ) as answer:
            stopping = threading.Thread(target=instance.stop, args=(10.0,))
            stopping.start()
            wait_for(lambda: (instance.state() or {}).get("state") == "draining")
            with httpx.Client(base_url=instance.url) as newcomer:
                assert newcomer.get("/health").status_code == 200
                for stream in (False, True):
                    refused = newcomer.post("/v1/chat/completions", json=chat_body(stream=stream))
                    assert refused.status_code == 500
                    assert refused.json()["error"]["type"] == "InternalServerError"
            assert events_of(answer.read().decode())[-2]["choices"][0]["finish_reason"] == "length"
        stopping.join(10)
        assert instance.state() is None

    def test_after_the_grace_streams_end_with_an_error_event(self, instance):
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(**LONG)) as answer:
            instance.stop(0.0)
            *_, error, done = events_of(answer.read().decode())
        assert error["error"]["code"] == 500
        assert done == "[DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(instance.url + "/health")

    def test_a_dead_engine_answers_once_more_and_is_gone(self, instance):
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(**LONG)) as answer:
            with raw_request(instance, max_tokens=4000) as whole:
                instance.change("faults", crash=True)
                assert whole.recv(4096).startswith(b"HTTP/1.1 500")
            *_, error, done = events_of(answer.read().decode())
        assert error["error"]["type"] == "InternalServerError"
        assert done == "[DONE]"
        with httpx.Client(base_url=instance.url) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/health").status_code == 503
            assert client.post("/v1/chat/completions", json=chat_body()).status_code == 500
        wait_for(lambda: instance.state() is None)
        with pytest.raises(httpx.ConnectError):
            httpx.get(instance.url + "/health")

    def test_a_killed_process_resets_its_connections(self, instance):
        with instance.http.stream("POST", "/v1/chat/completions", json=chat_body(**LONG)) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            instance.change("faults", kill=True)
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                list(pieces)
        assert instance.state() is None

    def test_injected_error_events_come_first_or_after_some_tokens(self, instance):
        instance.change("faults", faults={"error_events": 1})
        (error, done) = events_of(instance.chat(stream=True).text)
        assert (error["error"]["code"], done) == (500, "[DONE]")
        assert instance.chat().status_code == 200
        instance.change("faults", faults={"error_events": 1, "error_after_tokens": 5})
        *chunks, error, done = events_of(instance.chat(stream=True, max_tokens=100).text)
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert (error["error"]["code"], done) == (500, "[DONE]")
        instance.change("faults", faults={"error_events": 1})
        assert instance.chat().status_code == 500

    def test_an_api_key_guards_the_api_and_nothing_else(self, emulator):
        instance = emulator.start(api_key="secret")
        refused = instance.chat()
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        for path in ("/health", "/metrics", "/load"):
            assert instance.http.get(path).status_code == 200
        instance.http.headers["authorization"] = "Bearer secret"
        assert instance.chat().status_code == 200


class TestMetrics:
    def test_counters_add_up(self, instance):
        for _ in range(3):
            instance.chat(max_tokens=10)
        assert instance.metric("vllm:generation_tokens_total") == 30
        assert instance.metric("vllm:prompt_tokens_total") == 3 * 13
        assert instance.metric("vllm:request_success_total") == 3
        assert instance.metric("vllm:time_to_first_token_seconds_count") == 3
        assert instance.metric("vllm:inter_token_latency_seconds_count") == 27
        assert instance.metric("vllm:e2e_request_latency_seconds_count") == 3
        assert instance.metric("vllm:request_queue_time_seconds_count") == 3

    def test_load_counts_open_requests_only_if_it_is_tracked(self, emulator):
        for tracked in (True, False):
            instance = emulator.start(enable_server_load_tracking=tracked)
            with raw_request(instance, **LONG):
                assert instance.http.get("/load").json() == {"server_load": int(tracked)}
            instance.stop()

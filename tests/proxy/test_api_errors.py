"""ApiError: one shape for every failure, and what tells a client whether to come back."""

import json

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.request import Rejected, RejectReason
from proxy import errors
from proxy.errors import RETRY_AFTER_LIMIT_S, ApiError, of_engine, phrase, rejected
from proxy.wire import chunk, content_length, error_answer, header_lines, status_line

EVERY = (
    errors.bad_request("no", "body.n"),
    errors.unauthorized(),
    errors.model_not_found("m"),
    errors.slow_client("body", 10.0),
    errors.body_too_large(1024),
    errors.head_too_large(1024),
    *(rejected(Rejected(reason, contended, 2.0)) for reason in RejectReason for contended in (True, False)),
    errors.shutting_down(),
    errors.unreachable(),
    errors.broken(),
    errors.late(3.0),
)


def answer_of(error):
    """The error as an HTTP client reads it."""
    raw = error_answer(error, b"x-extra: 1\r\n", keep_alive=True)
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = [tuple(line.split(b": ", 1)) for line in lines[1:]]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.status} {error.code}")
class TestEvery:
    def test_has_openais_shape(self, error):
        told = json.loads(error.body())
        assert set(told) == {"error"}
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert told["error"]["message"]
        assert not told["error"]["message"].endswith(".")

    def test_is_a_whole_answer_with_the_right_length(self, error):
        answer = answer_of(error)
        assert answer.status_code == error.status
        assert int(answer.headers["content-length"]) == len(error.body())
        assert answer.headers["x-extra"] == "1"
        assert answer.json() == json.loads(error.body())

    def test_inside_a_stream_it_is_an_event_and_the_end(self, error):
        data, end, rest = error.event().split(b"\n\n")
        assert json.loads(data.removeprefix(b"data: ")) == json.loads(error.body())
        assert (end, rest) == (b"data: [DONE]", b"")

    def test_the_official_client_makes_a_typed_error_of_it(self, error):
        transport = httpx.MockTransport(lambda _: answer_of(error))
        client = openai.OpenAI(
            base_url="http://gateway/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=transport)
        )
        with pytest.raises(openai.APIStatusError) as caught:
            client.models.list()
        assert caught.value.status_code == error.status
        assert caught.value.type == error.kind
        assert caught.value.param == error.param

    def test_only_what_may_pass_later_says_when(self, error):
        """The client's own mistakes do not heal with time."""
        mentions = {name for name, _ in error.headers()}
        assert (b"retry-after" in mentions) == (error.retry_after_s is not None)
        if error.status in (400, 401, 404, 408, 413, 431):
            assert b"retry-after" not in mentions


class TestComingBack:
    @pytest.mark.parametrize(
        ("wait_s", "seconds", "milliseconds"),
        [(0.0, b"1", b"0"), (0.4, b"1", b"400"), (2.6, b"3", b"2600"), (1e9, b"30", b"30000"), (-5.0, b"1", b"0")],
    )
    def test_in_seconds_and_milliseconds(self, wait_s, seconds, milliseconds):
        told = dict(ApiError(429, "m", "k", retry_after_s=wait_s).headers())
        assert told == {b"retry-after": seconds, b"retry-after-ms": milliseconds, b"x-should-retry": b"true"}

    @given(st.floats(0.0, 1e6))
    def test_never_later_than_the_limit(self, wait_s):
        told = dict(ApiError(429, "m", "k", retry_after_s=wait_s).headers())
        assert 1 <= int(told[b"retry-after"]) <= RETRY_AFTER_LIMIT_S
        assert 0 <= int(told[b"retry-after-ms"]) <= 1000 * RETRY_AFTER_LIMIT_S

    def test_the_reason_it_was_dropped_for(self):
        told = dict(rejected(Rejected(RejectReason.TTL_EXPIRED, contended=True, retry_after_s=1.0)).headers())
        assert told[b"x-llm-d-request-dropped-reason"] == b"rejected-ttl-expired"

    def test_busy_is_a_429_and_nobody_there_a_503(self):
        assert rejected(Rejected(RejectReason.SATURATED, contended=True, retry_after_s=1.0)).status == 429
        assert rejected(Rejected(RejectReason.NO_ENDPOINTS, contended=False, retry_after_s=1.0)).status == 503


class TestOfEngine:
    @pytest.mark.parametrize(
        ("status", "body", "message", "code"),
        [
            (400, {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, "too long", 400),
            (401, {"error": "Unauthorized"}, "Unauthorized", 401),
            (404, {"detail": "Not Found"}, "Not Found", 404),
            (422, {"detail": [{"loc": ["body"]}]}, "The instance answered 422 Unprocessable Entity", 422),
            (500, {"error": {"message": "m", "code": None}}, "m", 500),
            (503, {}, "The instance answered 503 Service Unavailable", 503),
        ],
    )
    def test_vllms_several_shapes_become_one(self, status, body, message, code):
        error = of_engine(status, json.dumps(body).encode())
        assert (error.status, error.message) == (status, message)
        assert error.code == code

    @pytest.mark.parametrize(("status", "again"), [(429, True), (503, True), (500, False), (400, False)])
    def test_only_a_busy_engine_is_worth_another_try(self, status, again):
        assert (of_engine(status, b"{}").retry_after_s is not None) == again

    @given(st.integers(400, 599), st.binary(max_size=200))
    def test_any_bytes_make_one(self, status, body):
        error = of_engine(status, body)
        assert error.status == status
        assert json.loads(error.body())["error"]["message"]

    @given(
        st.integers(400, 599),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(
                    st.sampled_from(["error", "detail", "message", "type", "code", "param"]), inner, max_size=4
                )
            ),
        ),
    )
    def test_any_json_makes_one(self, status, told):
        error = of_engine(status, json.dumps(told).encode())
        assert set(json.loads(error.body())["error"]) == {"message", "type", "param", "code"}


class TestWire:
    @given(st.binary(min_size=1, max_size=5000))
    def test_a_chunk_can_be_read_again(self, payload):
        size, _, rest = chunk(payload).partition(b"\r\n")
        assert int(size, 16) == len(payload)
        assert rest == payload + b"\r\n"

    @pytest.mark.parametrize("status", [200, 204, 404, 418, 429, 503, 599])
    def test_a_status_line_has_its_phrase_where_there_is_one(self, status):
        assert status_line(status) == b"HTTP/1.1 %d %b\r\n" % (status, phrase(status).encode())

    def test_a_status_of_no_range(self):
        assert status_line(799) == b"HTTP/1.1 799 \r\n"
        assert phrase(799) == ""

    def test_lines(self):
        assert content_length(0) == b"content-length: 0\r\n"
        assert header_lines([(b"a", b"1"), (b"a", b"2")]) == b"a: 1\r\na: 2\r\n"
        assert b"connection: close\r\n" in error_answer(errors.late(1.0), b"", keep_alive=False)
        assert b"connection" not in error_answer(errors.late(1.0), b"", keep_alive=True)

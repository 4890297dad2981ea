"""An application must not notice the gateway: the same request sent to it and to an instance, the answers compared.

Everything a client can see is compared but what differs between two runs of one engine: ids, times, and the headers
that say which hop answered. What the gateway means to answer differently stands in ``TestOwnAnswers``.
"""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = "llama"
CLUSTER = {
    "models": [{"name": MODEL, "profile": "llama-3.1-8b-bf16-h100", "max_model_len": 80}],
    "nodes": [{"name": "node", "gpus": 1}],
    "pools": [{"name": "all", "model": MODEL, "request_class": "LL", "tp": 1}],
    "driver": {"kind": "emulator", "startup_s": 0.0},
    "controller": {"policy": "static"},
}
DIFFERS = {"id", "created", "system_fingerprint"}
HOP = {"date", "server", "x-request-id", "connection", "content-length", "transfer-encoding"}
USER = {"role": "user", "content": "Why is the sky blue?"}
CHAT = {"model": MODEL, "messages": [USER], "max_tokens": 5, "ignore_eos": True}
TEXT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True}
STREAM = {**CHAT, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Clients to the gateway and to its only instance."""
    config = tmp_path_factory.mktemp("transparency") / "cluster.yaml"
    config.write_text(yaml.safe_dump(CLUSTER))
    command = [sys.executable, "-m", "dynamollm", "serve", "--config", str(config), "--port", "0"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DYNAMOLLM_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            url = next(m[1] for line in process.stderr if (m := re.search(r"(http://\S+)/v1 is ready", line)))
            with httpx.Client(base_url=url, timeout=20) as gateway:
                instance = gateway.get("/admin/status").json()["instances"][0]["url"]
                with httpx.Client(base_url=instance, timeout=20) as engine:
                    yield gateway, engine
        finally:
            process.send_signal(signal.SIGINT)


def plain(told):
    """JSON without what differs from run to run."""
    if isinstance(told, dict):
        return {name: plain(value) for name, value in told.items() if name not in DIFFERS}
    return [plain(item) for item in told] if isinstance(told, list) else told


def events(text):
    """The events of a stream, in order; text and usage kept, ids and times not."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else plain(json.loads(line)) for line in data]


def joined(text):
    """A stream as a client puts it together: a busy engine sends several tokens in one event, a free one each alone."""
    said, others = {}, []
    for event in events(text):
        choices = event.get("choices") if event != "[DONE]" else None
        if not choices:
            others.append(event)
            continue
        (choice,) = choices
        words = choice.pop("text", None)
        if words is None:
            words = choice["delta"].pop("content", "")
        shape = {**event, "usage": None}
        about = said.setdefault(choice["index"], {"text": "", "role": None, "shape": shape, "end": None})
        about["text"] += words or ""
        about["role"] = (choice.get("delta") or {}).get("role") or about["role"]
        about["end"] = choice
    return said, others


def comparable(answer):
    """Status, headers and body as a client sees them."""
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        body = joined(answer.text)
    elif kind.startswith("application/json"):
        body = plain(answer.json())
    else:
        body = answer.text
    headers = {k: v for k, v in answer.headers.items() if k not in HOP and not k.startswith("x-dynamollm-")}
    return answer.status_code, headers, body


def both(sides, path, **how):
    return [comparable(side.post(path, **how)) for side in sides]


def assert_same(sides, path, **how):
    through, direct = both(sides, path, **how)
    assert through[0] == direct[0]
    assert through[2] == direct[2]
    assert through[1] == direct[1]


ANSWERED = {
    "plain chat": CHAT,
    "no max_tokens but a stop after few": {**CHAT, "max_tokens": 1},
    "max_completion_tokens": {**CHAT, "max_tokens": None, "max_completion_tokens": 3},
    "two choices": {**CHAT, "n": 2},
    "system and assistant turns": {
        **CHAT,
        "messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "It"}, USER],
    },
    "text in parts": {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]},
    "sampling parameters": {**CHAT, "temperature": 0.0, "top_p": 0.9, "top_k": 5, "seed": 7, "presence_penalty": 0.1},
    "vLLM's own parameters": {**CHAT, "min_tokens": 2, "repetition_penalty": 1.1, "skip_special_tokens": False},
    "a user and metadata": {**CHAT, "user": "somebody", "metadata": {"a": "b"}},
    "unicode and escapes": {**CHAT, "messages": [{"role": "user", "content": '\u00e9\U0001f600\n\t"\\\u2028'}]},
    "null fields": {**CHAT, "stop": None, "logit_bias": None, "stream": None, "n": None},
    "numbers as strings": {**CHAT, "max_tokens": "4"},
    "a stream": STREAM,
    "a stream with usage": {**STREAM, **USAGE},
    "a stream of two choices with usage": {**STREAM, **USAGE, "n": 2},
    "a stream of one token": {**STREAM, "max_tokens": 1},
    "usage declined": {**STREAM, "stream_options": {"include_usage": False}},
    "usage in every chunk": {**STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


@pytest.mark.parametrize("name", ANSWERED)
def test_chat_is_answered_alike(sides, name):
    assert_same(sides, "/v1/chat/completions", json=ANSWERED[name])


COMPLETIONS = {
    "plain": TEXT,
    "token ids": {**TEXT, "prompt": [1, 2, 3, 4]},
    "several prompts": {**TEXT, "prompt": ["one", "two"]},
    "echo": {**TEXT, "echo": True},
    "a stream": {**TEXT, "stream": True},
    "a stream with usage": {**TEXT, "stream": True, **USAGE},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_text_is_answered_alike(sides, name):
    assert_same(sides, "/v1/completions", json=COMPLETIONS[name])


REFUSED_BY_THE_ENGINE = {
    "messages of no kind": {**CHAT, "messages": []},
    "max_tokens of 0": {**CHAT, "max_tokens": 0},
    "negative max_tokens": {**CHAT, "max_tokens": -1},
    "n of 0": {**CHAT, "n": 0},
    "longer than the model's context": {**CHAT, "max_tokens": 10_000_000},
    "temperature below 0": {**CHAT, "temperature": -1},
}


@pytest.mark.parametrize("name", REFUSED_BY_THE_ENGINE)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_the_engine_refuses_is_refused_in_its_words(sides, name, stream):
    body = {**REFUSED_BY_THE_ENGINE[name], "stream": stream}
    through, direct = both(sides, "/v1/chat/completions", json=body)
    assert (through[0], through[2]) == (direct[0], direct[2])


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([1.5, 3.0, 1e30, "4", "x", "", [], {}, [1], ["a"], {"a": 1}, [[1, 2]], 10**400]),
)
ODD_FIELDS = st.dictionaries(
    st.sampled_from(
        (
            *("max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop", "min_tokens", "seed"),
            *("temperature", "top_p", "top_k", "messages", "prompt", "model", "tools", "user", "echo", "logprobs"),
            *("nvext", "response_format", "tool_choice", "chat_template_kwargs", "reasoning_effort", "unheard_of"),
        )
    ),
    VALUES,
    max_size=3,
)


class TestAnyBody:
    """What a client could get wrong, it gets told by the gateway as the engine would tell it."""

    @settings(max_examples=80, deadline=None)
    @given(ODD_FIELDS, st.sampled_from([("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]))
    def test_odd_fields_end_in_the_same_status(self, sides, odd, api):
        path, body = api
        through, direct = (side.post(path, json={**body, **odd}) for side in sides)
        assert through.status_code == direct.status_code, (through.text, direct.text)
        if through.status_code != 200:
            ours, theirs = through.json()["error"], direct.json()["error"]
            assert (set(ours), ours["code"]) == (set(theirs), theirs["code"])


class TestStreams:
    def test_chunks_come_one_by_one_and_not_at_the_end(self, sides):
        """In pieces: the gateway does not collect."""
        gateway, _ = sides
        with gateway.stream("POST", "/v1/chat/completions", json={**STREAM, "max_tokens": 12}) as answer:
            pieces = [piece for piece in answer.iter_raw() if piece]
        assert len(pieces) > 3  # a busy machine's engine sends several tokens at once
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")

    def test_the_usage_asked_for_the_books_is_not_shown_to_who_did_not_ask(self, sides):
        for side in sides:
            chunks = events(side.post("/v1/chat/completions", json=STREAM).text)[:-1]
            assert not any(chunk.get("usage") for chunk in chunks)
            assert all(chunk["choices"] for chunk in chunks)

    @pytest.mark.parametrize("api", ["/v1/chat/completions", "/v1/completions"])
    def test_the_same_text_the_same_end_the_same_usage(self, sides, api):
        body = {**(STREAM if "chat" in api else {**TEXT, "stream": True}), **USAGE, "max_tokens": 40}
        through, direct = (joined(side.post(api, json=body).text) for side in sides)
        assert through == direct
        (said,), others = through[0].values(), through[1]
        assert len(said["text"].split()) == 40
        assert [event if event == "[DONE]" else event["usage"]["completion_tokens"] for event in others] == [
            40,
            "[DONE]",
        ]


class TestHttp:
    def test_one_connection_serves_many_requests(self, sides):
        gateway, _ = sides
        ports = set()
        for body in (CHAT, STREAM, {**CHAT, "max_tokens": 0}, CHAT):
            answer = gateway.post("/v1/chat/completions", json=body)
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1

    def test_a_request_id_comes_back(self, sides):
        for side in sides:
            answer = side.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-7"})
            assert answer.headers["x-request-id"] == "mine-7"
            assert "mine-7" in answer.json()["id"]

    @pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
    def test_an_answer_is_readable_whatever_encoding_is_accepted(self, sides, encoding):
        gateway, _ = sides
        answer = gateway.post("/v1/chat/completions", json=CHAT, headers={"accept-encoding": encoding})
        assert answer.json()["usage"]["completion_tokens"] == 5

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
    def test_other_methods_are_refused_alike(self, sides, method):
        through, direct = (side.request(method, "/v1/chat/completions") for side in sides)
        assert through.status_code == direct.status_code == 405

    def test_the_list_of_models_has_the_same_shape(self, sides):
        through, direct = (side.get("/v1/models").json() for side in sides)
        assert through["object"] == direct["object"] == "list"
        assert [m["id"] for m in through["data"]] == [m["id"] for m in direct["data"]] == [MODEL]
        assert set(through["data"][0]) <= set(direct["data"][0])

    def test_an_unknown_path_is_a_404_for_both(self, sides):
        assert [side.get("/v1/nothing").status_code for side in sides] == [404, 404]


class TestOwnAnswers:
    """Where the gateway answers itself: still what the engine would say, in status, shape and type."""

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b'{"model": "llama", "messages": "x"}'],
        ids=["empty", "cut", "list", "null", "number", "string", "no utf-8", "messages of no list"],
    )
    def test_a_body_that_is_none(self, sides, body):
        answers = [
            side.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            for side in sides
        ]
        assert [a.status_code for a in answers] == [400, 400]
        assert set(answers[0].json()["error"]) == set(answers[1].json()["error"])
        assert answers[0].json()["error"]["code"] == answers[1].json()["error"]["code"]

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("api", ["/v1/chat/completions", "/v1/completions"])
    def test_an_unknown_model(self, sides, api, stream):
        body = {**(CHAT if "chat" in api else TEXT), "model": "gpt-9", "stream": stream}
        told = [side.post(api, json=body) for side in sides]
        assert [answer.status_code for answer in told] == [404, 404]
        ours, theirs = (answer.json()["error"] for answer in told)
        assert (ours["type"], ours["code"], ours["param"]) == (theirs["type"], theirs["code"], theirs["param"])
        assert "gpt-9" in ours["message"]

    @pytest.mark.parametrize("field", ["max_tokens", "n", "stream"])
    def test_a_field_of_the_wrong_type(self, sides, field):
        told = [side.post("/v1/chat/completions", json={**CHAT, field: {"a": 1}}) for side in sides]
        assert [answer.status_code for answer in told] == [400, 400]
        assert field in told[0].json()["error"]["message"] + str(told[0].json()["error"]["param"])

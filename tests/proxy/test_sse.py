"""Events of a stream: whole ones out, whatever the pieces in."""

import json
from itertools import pairwise

from gateway_fakes import DONE, TOKENS, USAGE, USAGE_EVENT, event
from hypothesis import given
from hypothesis import strategies as st

from proxy.sse import EventFilter, Usage, error_status, first_event, usage_of, with_tier

STREAM = b"".join(TOKENS) + USAGE_EVENT + DONE


def fed(stream: bytes, cuts, **options):
    events = EventFilter(**{"strip_usage": True, **options})
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    out = [events.feed(stream[a:b]) for a, b in pairwise(places)]
    return out, events


@given(cuts=st.lists(st.integers(min_value=0), max_size=40), strip=st.booleans())
def test_any_cut_gives_the_same_whole_events(cuts, strip):
    out, events = fed(STREAM, cuts, strip_usage=strip)
    assert b"".join(out) == (b"".join(TOKENS) + DONE if strip else STREAM)
    assert all(piece == b"" or piece.endswith(b"\n\n") for piece in out)
    assert events.usage == Usage(USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert events.rest() == b""


@given(st.text())
def test_text_about_usage_is_only_text(text):
    chunk = event({"choices": [{"delta": {"content": text + '"usage":{"completion_tokens":9}'}}]})
    out, events = fed(chunk, ())
    assert (out, events.usage) == ([chunk], None)


def test_usage_on_a_chunk_with_text_is_read_but_kept():
    chunk = event({"choices": [{"delta": {"content": "a"}}], "usage": USAGE})
    out, events = fed(chunk, ())
    assert out == [chunk]
    assert events.usage.completion_tokens == 3


def test_an_event_that_only_looks_like_usage_passes():
    broken = b'data: {"usage": oops\n\n'
    other = b'event: x\ndata: {"usage":1}\n\n'
    assert fed(broken + other, ())[0] == [broken + other]


def test_a_stream_that_ends_without_its_blank_line():
    out, events = fed(TOKENS[0] + DONE[:-1], ())
    assert out == [TOKENS[0]]
    assert events.rest() == DONE[:-1]


def test_an_event_longer_than_any_is_let_through_as_it_comes():
    long = b"data: " + b"x" * 2**20
    out, _ = fed(TOKENS[0] + long, ())
    assert out == [TOKENS[0] + long]


def test_the_tier_is_told_in_every_chunk_with_json():
    out, _ = fed(STREAM, (), tier="flex")
    events = b"".join(out).split(b"\n\n")[:-1]
    assert [json.loads(e[6:])["service_tier"] for e in events[:-1]] == ["flex"] * len(TOKENS)
    assert events[-1] == b"data: [DONE]"
    assert with_tier(b"not json", "flex") == b"not json"


def test_first_event():
    assert first_event(b": ping\n\n") is None
    assert first_event(b"data: {") is None
    assert first_event(b": ping\n\n\ndata: {}\n\n") == b"{}"
    assert first_event(b"data:{}\n\n") == b"{}"


def test_error_status():
    assert error_status(b'{"error":{"message":"m","code":503}}') == 503
    assert error_status(b'{"error":{"message":"m","code":"busy"}}') == 500
    assert error_status(b'{"error":"overloaded"}') == 500
    assert error_status(b'{"error":null,"choices":[]}') is None
    assert error_status(b'{"choices":[]}') is None
    assert error_status(b'{"error":') is None
    assert error_status(b"[DONE]") is None


def test_usage_of_a_whole_answer():
    assert usage_of(b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"x":{}}}') == Usage(1, 2)
    assert usage_of(b'{"choices":[]}') is None
    assert usage_of(b"{") is None
    assert usage_of(b'{"usage":{"prompt_tokens":"many"}}') is None


def test_energy_stands_in_the_usage_event_where_it_is_asked_for():
    asked = []

    def energy_j(usage):
        asked.append(usage.completion_tokens)
        return 1.2345

    event = b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7,"total_tokens":10}}\n\n'
    delta = b'data: {"id":"a","choices":[{"index":0,"text":"x"}],"usage":null}\n\n'
    told = EventFilter(strip_usage=False, energy_j=energy_j).feed(delta + event)
    assert told.startswith(delta), "other events stay as they are"
    usage = json.loads(told[len(delta) + 6 :])["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10, "energy_mj": 1234}
    assert asked == [7]
    unknown = EventFilter(strip_usage=False, energy_j=lambda usage: None).feed(event)
    assert unknown == event

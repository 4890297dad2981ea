import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay import ReplayRequest
from benchmarks.replay_body import RequestBodies
from benchmarks.replay_prompt import (
    TEXT_WORDS,
    VOCABULARY,
    Calibration,
    PromptText,
    calibrated,
    counted_alike,
    repeated,
)
from benchmarks.replay_stream import StreamReader, status_reason

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":" a"},"finish_reason":null}],"other":[1]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"energy_mj":1500}}\n\n'
DONE = b"data: [DONE]\n\n"
TEXT = PromptText()


def test_a_chat_stream():
    reader = StreamReader()
    for at_s, piece in enumerate((ROLE, TOKEN, TOKEN + TOKEN, USAGE, DONE)):
        reader.feed(piece, float(at_s))
    assert reader.first_s == 0.0  # the role chunk marks the first token
    assert reader.token_s == [1.0, 2.0, 2.0]
    assert (reader.prompt_tokens, reader.completion_tokens, reader.energy_mj) == (7, 3, 1500)
    assert reader.done
    assert reader.failure is None


def test_text_completions_and_reasoning_count_as_tokens():
    reader = StreamReader()
    reader.feed(b'data: {"choices":[{"text":" a"}]}\n\ndata: {"choices":[{"text":""}]}\n\n', 1.0)
    reader.feed(b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n', 2.0)
    assert reader.token_s == [1.0, 2.0]


@given(st.lists(st.integers(1, 40), max_size=40))
def test_any_splitting_of_the_bytes_reads_the_same(sizes):
    whole = ROLE + b": keep-alive\n\n" + TOKEN.replace(b"\n", b"\r\n") + TOKEN + USAGE + DONE
    reader = StreamReader()
    at = 0
    for size in sizes:
        reader.feed(whole[at : at + size], 1.0)
        at += size
    reader.feed(whole[at:], 1.0)
    assert len(reader.token_s) == 2
    assert reader.done
    assert reader.completion_tokens == 3
    assert reader.failure is None


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (
            b'data: {"error":{"message":"engine died","type":"x","code":503}}\n\n',
            "error in the stream: 503 engine died",
        ),
        (b'data: {"error":"no"}\n\n', "error in the stream: no"),
        (b"data: {nonsense\n\n", "unreadable event"),
    ],
)
def test_errors_inside_a_stream_are_failures(event, reason):
    reader = StreamReader()
    reader.feed(ROLE + event + DONE, 0.0)
    assert reader.failure is not None
    assert reader.failure.startswith(reason)


@pytest.mark.parametrize(
    ("status", "body", "dropped", "reason"),
    [
        (429, b"{}", "rejected-saturated", "HTTP 429 rejected-saturated"),
        (404, b'{"error":{"message":"no such model","code":404}}', None, "HTTP 404 no such model"),
        (401, b'{"error":"Unauthorized"}', None, "HTTP 401 Unauthorized"),
        (502, b"<html>", None, "HTTP 502"),
        (500, b'{"detail":"x"}', None, "HTTP 500"),
    ],
)
def test_statuses_become_countable_reasons(status, body, dropped, reason):
    assert status_reason(status, body, dropped) == reason


def test_words_are_all_of_one_length_and_need_no_escaping():
    assert {len(word) for word in VOCABULARY} == {4}
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert all(word.isascii() and word.isalpha() for word in VOCABULARY)


@given(st.integers(-5, 10**6), st.integers(1, 3000))
def test_a_stretch_has_exactly_its_words(number, words):
    stretch = TEXT.stretch(number, words).decode()
    assert stretch.count(" ") == words
    assert set(stretch[1:].split(" ")) <= set(VOCABULARY)


def test_prompts_longer_than_the_text_are_possible():
    assert len(TEXT.stretch(3, 2 * TEXT_WORDS + 5).split()) == 2 * TEXT_WORDS + 5


def test_prompts_share_no_prefix():
    starts = {TEXT.stretch(number, 16) for number in range(20_000)}
    assert len(starts) == 20_000


def test_the_same_seed_gives_the_same_text():
    assert PromptText(seed=1).stretch(5, 50) == PromptText(seed=1).stretch(5, 50) != PromptText(seed=2).stretch(5, 50)


@given(st.floats(0, 60), st.floats(0.3, 3), st.integers(100, 20_000))
def test_calibration_hits_the_wanted_tokens(fixed, per_word, wanted):
    def target(words):
        return round(fixed + per_word * words)

    calibration = calibrated((16, target(16)), (272, target(272)))
    # two whole counts over 256 words know the slope to 1/256
    assert abs(target(calibration.words(wanted)) - wanted) <= per_word / 2 + 1 + wanted / 256 / per_word


def test_only_words_the_target_counts_alike_are_used():
    assert counted_alike({"time": 42, "year": 74, "work": 42}) == ("time", "work")
    assert counted_alike({"time": 74, "year": 42}) == ("year",)  # the cheaper of equal groups
    assert set(PromptText(("time", "work")).stretch(3, 500).split()) == {b"time", b"work"}
    assert repeated("time", 3) == b" time time time"


def test_a_target_that_does_not_count_is_refused():
    with pytest.raises(ValueError, match="does not follow the prompt"):
        calibrated((16, 5), (272, 5))


def test_bodies_ask_for_exact_lengths():
    request = ReplayRequest(3, 0.0, 110, 64)
    body = json.loads(RequestBodies('a "model"', True, Calibration(10, 1.0), TEXT).render(request))
    assert body["model"] == 'a "model"'
    assert len(body["messages"][0]["content"].split()) == 100
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (64, True, True)
    assert body["stream_options"] == {"include_usage": True}
    body = json.loads(RequestBodies("m", False, Calibration(), TEXT).render(request))
    assert len(body["prompt"].split()) == 110
    assert RequestBodies("m", False).path == "/v1/completions"


def test_the_shortest_prompt_is_one_word():
    assert Calibration(50, 1.25).words(3) == 1

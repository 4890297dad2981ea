"""What is read of request bodies, and that the rest stays as it came."""

import json

import pytest
from gateway_fakes import CHAT
from hypothesis import given
from hypothesis import strategies as st

from pools.tokens import PromptSize
from proxy.errors import ApiError
from proxy.fields import (
    CHAT_PATH,
    COMPLETION_PATH,
    ENDING_BYTES,
    OPENING_BYTES,
    prompt_of,
    read_chat,
    read_completion,
    rewritten,
    stream_options_with_usage,
)


def chat(**fields):
    return read_chat(json.dumps({**CHAT, **fields}).encode())


def completion(**fields):
    return read_completion(json.dumps({"model": "tiny", **fields}).encode())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
READ = {
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("n", "priority", "service_tier"),
}


@given(st.dictionaries(st.text().filter(lambda name: name not in READ), JSON, max_size=6))
def test_unknown_fields_of_any_shape_pass(unknown):
    body = json.dumps({**unknown, **CHAT}).encode()
    assert read_chat(body).model == "tiny"
    assert json.loads(rewritten(body, {"priority": None, "x-new": 1})) == {
        **{name: value for name, value in json.loads(body).items() if name != "priority"},
        "x-new": 1,
    }


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body):
    for read in (read_chat, read_completion):
        refusal = None
        try:
            read(body)
        except ApiError as error:
            refusal = error
        assert refusal is None or (refusal.status == 400 and refusal.param.startswith("body"))


def test_bytes_of_other_fields_stay_as_they_came():
    body = b'{ "temperature" : 1.0e0, "big":123456789012345678901234567890, "priority":5, "s":"\\u00e9" }'
    assert rewritten(body, {"priority": None}) == (
        b'{"temperature":1.0e0,"big":123456789012345678901234567890,"s":"\\u00e9"}'
    )


def test_text_is_measured_in_all_shapes():
    plain = chat(messages=[{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": None}])
    assert plain.size == PromptSize(100 + 2 + len("null"), 2)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    parts = chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 100}, image]}])
    assert parts.size == PromptSize(102, 1)
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    called = chat(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}])
    assert called.size == PromptSize(3 + len(json.dumps(calls)), 2)
    odd = chat(messages=[{"role": "user", "content": ["x"]}])
    assert odd.size.text_bytes == len('["x"]')
    assert chat(tools=[{"type": "function"}]).size.text_bytes > chat().size.text_bytes
    assert chat(messages=[]).size == PromptSize(0, 0)


@pytest.mark.parametrize(
    ("prompt", "text_bytes", "tokens"),
    [
        ("x" * 100, 102, None),
        (["a", "b"], 10, None),
        ([1, 2, 3], 0, 3),
        ([[1, 2], [3]], 0, 3),
        ([], 2, None),
        (None, 4, None),
    ],
)
def test_prompts(prompt, text_bytes, tokens):
    fields = completion(prompt=prompt)
    assert (fields.size.text_bytes, fields.input_tokens) == (text_bytes, tokens)


def test_numbers_are_taken_as_laxly_as_vllm_does():
    assert chat(max_tokens="3").cap_tokens == 3
    assert chat(max_tokens=3.0).cap_tokens == 3
    assert chat(max_tokens=None, max_completion_tokens=7).cap_tokens == 7
    assert chat(max_tokens=3, max_completion_tokens=7).cap_tokens == 7
    assert chat(n=None).choices == 1
    assert chat(n=4).choices == 4
    assert chat(stream="true").stream
    assert not chat(stream=0).stream
    assert not chat(stream=None).stream


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "many"}, "body.max_tokens"),
        ({"max_tokens": 1.5}, "body.max_tokens"),
        ({"max_tokens": float("inf")}, "body"),
        ({"max_tokens": {}}, "body.max_tokens"),
        ({"max_completion_tokens": "x"}, "body.max_completion_tokens"),
        ({"stream": "perhaps"}, "body.stream"),
        ({"stream": []}, "body.stream"),
        ({"model": 3}, "body.model"),
        ({"messages": {}}, "body.messages"),
        ({"messages": ["hello"]}, "body.messages[0]"),
        ({"stream_options": {"include_usage": "x"}}, "body.stream_options.include_usage"),
        ({"n": "x"}, "body.n"),
        ({"priority": "x"}, "body.priority"),
        ({"service_tier": 3}, "body.service_tier"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("hint", [{"agent_hints": {"osl": 250}}, {"agent_hints": {"osl": "250"}}])
def test_hints(hint):
    assert chat(nvext=hint).hint_tokens == 250


@pytest.mark.parametrize(
    "hint", [None, 3, {}, {"agent_hints": None}, {"agent_hints": {"osl": "x"}}, {"agent_hints": 1}]
)
def test_a_bad_hint_is_none(hint):
    assert chat(nvext=hint).hint_tokens is None
    assert chat(nvext={"agent_hints": {"osl": -1}}).hint_tokens is None


def test_features():
    fields = chat(tools=[{}], response_format={"type": "json_object"}, chat_template_kwargs={"enable_thinking": True})
    assert (fields.tools, fields.structured, fields.thinking) == (True, True, True)
    fields = chat(tools=[], reasoning_effort="high")
    assert (fields.tools, fields.structured, fields.thinking) == (False, False, True)


def test_text_for_exact_counting():
    messages = [
        {"role": "system", "content": "be \u00e9"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    body = json.dumps({"messages": messages}).encode()
    assert prompt_of(CHAT_PATH, body) == [("system", "be \u00e9"), ("user", "ab"), ("assistant", "")]
    assert prompt_of(COMPLETION_PATH, b'{"prompt":"x\\ny"}') == "x\ny"
    assert prompt_of(COMPLETION_PATH, b'{"prompt":["x","y"]}') == "xy"


def test_usage_is_asked_for_beside_other_stream_options():
    assert stream_options_with_usage(b"{}") == {"include_usage": True}
    body = b'{"stream_options":{"include_usage":false,"continuous_usage_stats":true}}'
    assert stream_options_with_usage(body) == {"include_usage": True, "continuous_usage_stats": True}
    assert stream_options_with_usage(b'{"stream_options":null}') == {"include_usage": True}


def user(text, **more):
    return {"role": "user", "content": text, **more}


SYSTEM = {"role": "system", "content": "You are brief. " * 200}


def test_the_last_user_turn_is_kept_by_both_ends():
    assert chat(messages=[user("first"), {"role": "assistant", "content": "x"}, user("last")]).turn == b'"last"'
    text = "a" * 300 + "b" * 300
    turn = chat(messages=[user(text)]).turn
    opening, ending = turn.split(b"\0")
    assert opening == b'"' + b"a" * (OPENING_BYTES - 1)
    assert ending == b"b" * (ENDING_BYTES - 1) + b'"'
    exact = "c" * (OPENING_BYTES + ENDING_BYTES - 2)
    assert chat(messages=[user(exact)]).turn == b'"%b"' % exact.encode()


def test_tool_results_do_not_hide_the_user_and_long_talk_is_not_searched():
    calls = [{"role": "assistant", "content": None}, {"role": "tool", "content": "42"}]
    assert chat(messages=[user("ask"), *calls]).turn == b'"ask"'
    assert chat(messages=[user("ask"), *calls * 50]).turn == b'"42"'


def test_the_turn_of_a_completion_is_its_prompt():
    assert completion(prompt="say it").turn == b'"say it"'
    assert completion(prompt=["one", "two"]).turn == b'["one", "two"]'
    assert completion(prompt=[1, 2, 3]).turn == b""
    assert completion().turn == b""
    assert chat(messages=[]).turn == b""


def test_system_prompts_are_told_apart_by_their_beginning():
    plain = chat(messages=[user("a")])
    first = chat(messages=[SYSTEM, user("a")])
    assert plain.system == 0 != first.system
    assert first.system == chat(messages=[SYSTEM, user("b"), user("c")]).system
    developer = {**SYSTEM, "role": "developer"}
    assert first.system == chat(messages=[developer, user("a")]).system
    other = {**SYSTEM, "content": "You are long. " * 200}
    assert chat(messages=[other, user("a")]).system not in (0, first.system)
    assert chat(messages=[user("a"), SYSTEM]).system == 0  # only what stands first sets the tone


def test_tool_choices_are_told_apart():
    said = [chat(tool_choice=choice).tool_choice for choice in ("auto", "required", {"type": "function"})]
    assert len({0, *said}) == 4
    assert chat().tool_choice == 0


@given(st.text(max_size=2000), st.integers(1, 12))
def test_what_is_kept_of_a_turn_is_bounded(text, repeats):
    fields = chat(messages=[user(text * repeats)])
    assert len(fields.turn) <= OPENING_BYTES + 1 + ENDING_BYTES
    assert fields == chat(messages=[user(text * repeats)])

"""Requests as data: lengths, stops, seeds, limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.emulator.bodies import (
    BodyRules,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from simulator.emulator.errors import ApiError
from simulator.emulator.render import StreamRenderer, choice_text
from simulator.emulator.text import FourByteTokenizer, OutputLengths, Words
from simulator.emulator.validation import decode_json

RULES = BodyRules("tiny", 4096, FourByteTokenizer(), OutputLengths())
HELLO = [{"role": "user", "content": "Hello there"}]


def chat(rules: BodyRules = RULES, **fields):
    return parse_chat({"messages": HELLO, **fields}, rules)


def completion(rules: BodyRules = RULES, **fields):
    return parse_completion({"prompt": "Hello there", **fields}, rules)


def test_exact_lengths_with_ignore_eos():
    (choice,) = chat(max_tokens=321, ignore_eos=True).choices
    assert (choice.output_tokens, choice.finish_reason) == (321, "length")


def test_max_completion_tokens_wins_over_max_tokens():
    assert chat(max_tokens=50, max_completion_tokens=7, ignore_eos=True).choices[0].output_tokens == 7


def test_output_is_cut_where_the_context_ends():
    (choice,) = completion(prompt=[5] * 4090, max_tokens=200, ignore_eos=True).choices
    assert choice.output_tokens == 6


def test_a_chat_may_use_the_whole_context_and_a_completion_gets_16_tokens():
    assert chat(ignore_eos=True).choices[0].output_tokens == 4096 - 13
    assert completion(ignore_eos=True).choices[0].output_tokens == 16


def test_lengths_without_ignore_eos_are_drawn_once_and_for_all():
    lengths = {chat(seed=seed).choices[0].output_tokens for seed in range(50)}
    assert len(lengths) > 30
    assert chat(seed=3) == chat(seed=3)
    first, second = chat(n=2).choices
    assert first.words != second.words


def test_lengths_follow_the_distribution():
    drawn = sorted(OutputLengths(100.0, 0.5).tokens(seed * 2654435761 & 0xFFFFFFFF) for seed in range(4000))
    assert drawn[2000] == pytest.approx(100, rel=0.06)
    assert drawn[3600] == pytest.approx(100 * 2.718 ** (1.2816 * 0.5), rel=0.08)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(0, 300))
def test_output_respects_its_bounds(seed, max_tokens, min_tokens):
    if min_tokens > max_tokens:
        with pytest.raises(ApiError, match="min_tokens"):
            chat(seed=seed, max_tokens=max_tokens, min_tokens=min_tokens)
        return
    (choice,) = chat(seed=seed, max_tokens=max_tokens, min_tokens=min_tokens).choices
    assert max(1, min_tokens) <= choice.output_tokens <= max_tokens
    if choice.output_tokens < max_tokens:
        assert choice.finish_reason == "stop"


@given(st.integers(0, 1000), st.sampled_from([" the", "an", "zz", "e of t"]))
def test_text_ends_before_the_stop_string(seed, stop):
    free = chat(seed=seed, max_tokens=60, ignore_eos=True).choices[0]
    stopped = chat(seed=seed, max_tokens=60, ignore_eos=True, stop=[stop, "never"]).choices[0]
    text = free.words.text(60)
    if stop not in text:
        assert stopped == free
        return
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert choice_text(stopped, 0, stopped.output_tokens) == text[: text.index(stop)]
    pieces = [choice_text(stopped, i, i + 1) for i in range(stopped.output_tokens)]
    assert "".join(pieces) == text[: text.index(stop)]


def test_the_token_that_ends_the_sequence_has_no_text():
    choice = next(c for c in (chat(seed=s).choices[0] for s in range(100)) if c.finish_reason == "stop")
    assert choice_text(choice, choice.output_tokens - 1, choice.output_tokens) == ""
    assert choice_text(choice, 0, choice.output_tokens) == choice.words.text(choice.output_tokens - 1)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_however_tokens_are_merged_the_stream_says_the_same(seed, sizes):
    generation = chat(seed=seed, max_tokens=sum(sizes), ignore_eos=True, stream=True)
    renderer = StreamRenderer(generation, "chatcmpl-1", "tiny", 0)
    said, begin = b"", 0
    for size in sizes:
        said += renderer.tokens(0, begin, begin + size)
        begin += size
    content = "".join(event["choices"][0]["delta"]["content"] for event in map(decode_event, said.split(b"\n\n")[:-1]))
    assert content == Words(generation.choices[0].words.seed).text(sum(sizes))


def decode_event(event: bytes):
    return decode_json(event.removeprefix(b"data: "), "application/json")


def test_an_echoed_prompt_is_escaped():
    prompt = 'say "no"\n\\ \u00e9'
    generation = completion(prompt=prompt, echo=True, stream=True)
    event = StreamRenderer(generation, "cmpl-1", "tiny", 0).first(0)
    assert decode_event(event.strip())["choices"][0]["text"] == prompt


def test_priority_is_turned_round_and_needs_the_policy():
    rules = BodyRules("tiny", 4096, FourByteTokenizer(), OutputLengths(), by_priority=True)
    assert chat(rules, priority=5).priority == -5
    assert chat(priority=0).priority == 0
    with pytest.raises(ApiError, match="scheduling-policy") as refused:
        chat(priority=1)
    assert (refused.value.status, refused.value.param) == (400, "priority")


def test_several_prompts_times_n():
    generation = completion(prompt=["one", "and two"], n=2, max_tokens=3)
    assert [c.input_tokens for c in generation.choices] == [1, 1, 2, 2]
    assert generation.prompt_tokens == 3


def test_ids_out_of_the_vocabulary_are_found_before_a_whole_answer_and_within_a_stream():
    beyond = [1, 2**40]
    with pytest.raises(ApiError, match=f"{2**40} is out of vocabulary"):
        completion(prompt=beyond)
    generation = completion(prompt=beyond, stream=True)
    assert generation.vocabulary_error is not None
    assert b"data: {" in generation.vocabulary_error.event()


def test_text_that_is_too_long_says_at_least():
    with pytest.raises(ApiError, match="contains at least 4097 input tokens") as refused:
        completion(prompt="abcd" * 5000)
    assert refused.value.param == "input_tokens"


@given(st.text())
def test_a_four_byte_token_is_a_reversible_count(text):
    tokenizer = FourByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.count(text) == len(ids)
    if "\0" not in text:
        assert tokenizer.decode(ids) == text


@given(st.lists(st.tuples(st.sampled_from(["system", "user"]), st.text(max_size=20)), min_size=1, max_size=5))
def test_a_conversation_counts_what_it_encodes(messages):
    tokenizer = FourByteTokenizer()
    assert tokenizer.count_chat(messages) == len(tokenizer.encode_chat(messages))


def test_tokenize_agrees_with_usage():
    assert parse_tokenize({"messages": HELLO}, RULES)["count"] == chat().prompt_tokens
    tokens = parse_tokenize({"prompt": "Hello there"}, RULES)["tokens"]
    assert parse_detokenize({"tokens": tokens}, RULES) == {"prompt": "Hello there"}


@pytest.mark.parametrize("raw", [b'{"a": NaN}', b'{"a": 1e400}'])
def test_json_that_only_a_lax_reader_takes(raw):
    assert "a" in decode_json(raw, "application/json; charset=utf-8")


def test_bytes_that_are_no_text_are_a_400():
    with pytest.raises(ApiError) as refused:
        decode_json(b'{"a": "\xff\xfe"}', "application/json")
    assert refused.value.status == 400

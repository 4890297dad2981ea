"""What the emulator writes, as data: a stream put together is the answer given whole; text and token ids are one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.emulator.bodies import BodyRules, parse_chat, parse_completion, parse_detokenize, parse_tokenize
from simulator.emulator.render import DONE, StreamRenderer, choice_text, whole_answer
from simulator.emulator.text import (
    CHAT_TOKENS,
    GENERATION_TOKENS,
    MESSAGE_TOKENS,
    FourByteTokenizer,
    OutputLengths,
    Words,
    output_seed,
)

RULES = BodyRules("tiny", 4096, FourByteTokenizer(), OutputLengths(median_tokens=30.0))
TOKENIZER = FourByteTokenizer()
USER = {"role": "user", "content": "Hello there"}

requests = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 60)},
    optional={
        "n": st.integers(1, 3),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 50),
        "stop": st.sampled_from(["the", " a", ["you", "me"], "nothing says this"]),
        "stream_options": st.sampled_from(
            [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
        ),
    },
)


def parsed(chat, fields):
    body = {"stream": True, **fields}
    if chat:
        return parse_chat({"messages": [USER], **body}, RULES)
    return parse_completion({"prompt": "Hello there", "echo": fields["max_tokens"] % 2 == 0, **body}, RULES)


def streamed(generation, cuts):
    """All events of a stream whose choices come in pieces cut at these places."""
    renderer = StreamRenderer(generation, "id-1", "tiny", 17)
    out = b""
    for index, choice in enumerate(generation.choices):
        out += renderer.first(index)
        places = sorted({cut % choice.output_tokens for cut in cuts} - {0})
        begin = 0
        for end in places:
            out += renderer.tokens(index, begin, end)
            begin = end
        out += renderer.last(index, begin, choice.output_tokens, choice.finish_reason)
    return out + renderer.end(sum(choice.output_tokens for choice in generation.choices))


def events(stream):
    *lines, rest = stream.split(b"\n\n")
    assert rest == b""
    assert lines[-1] + b"\n\n" == DONE
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


def texts(chunks, chat):
    said = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            said[choice["index"]] = said.get(choice["index"], "") + piece
    return said


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
class TestStreamsAndAnswers:
    @given(requests, st.lists(st.integers(0, 59), max_size=12))
    def test_a_stream_put_together_is_the_answer_given_whole(self, chat, fields, cuts):
        generation = parsed(chat, fields)
        chunks = events(streamed(generation, cuts))
        ends = [(choice.output_tokens, choice.finish_reason) for choice in generation.choices]
        whole = json.loads(whole_answer(generation, "id-1", "tiny", 17, ends))
        said = texts(chunks, chat)
        for choice in whole["choices"]:
            text = choice["message"]["content"] if chat else choice["text"]
            assert said[choice["index"]] == text
        finished = {
            choice["index"]: (choice["finish_reason"], choice.get("stop_reason"))
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["finish_reason"]
        }
        assert finished == {c["index"]: (c["finish_reason"], c["stop_reason"]) for c in whole["choices"]}

    @given(requests, st.lists(st.integers(0, 59), max_size=5))
    def test_every_chunk_has_the_same_head(self, chat, fields, cuts):
        kind = "chat.completion.chunk" if chat else "text_completion"
        for chunk in events(streamed(parsed(chat, fields), cuts)):
            head = {name: chunk[name] for name in ("id", "object", "created", "model")}
            assert head == {"id": "id-1", "object": kind, "created": 17, "model": "tiny"}

    @given(requests, st.lists(st.integers(0, 59), max_size=5))
    def test_usage_comes_last_once_and_only_if_asked_for(self, chat, fields, cuts):
        generation = parsed(chat, fields)
        chunks = events(streamed(generation, cuts))
        asked = bool((fields.get("stream_options") or {}).get("include_usage"))
        alone = [chunk for chunk in chunks if not chunk["choices"]]
        assert len(alone) == asked
        if asked:
            assert chunks[-1] is alone[0]
            usage = alone[0]["usage"]
            assert usage["prompt_tokens"] == generation.prompt_tokens
            assert usage["completion_tokens"] == sum(c.output_tokens for c in generation.choices)
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    @given(requests)
    def test_a_stop_string_is_not_in_the_text_and_nothing_comes_after_it(self, chat, fields):
        for choice in parsed(chat, fields).choices:
            text = choice_text(choice, 0, choice.output_tokens)
            if choice.stop_reason is not None:
                assert choice.stop_reason not in text
                assert choice.words.text(choice.output_tokens).startswith(text + choice.stop_reason)

    @given(requests)
    def test_lengths_obey_the_request(self, chat, fields):
        for choice in parsed(chat, fields).choices:
            assert 1 <= choice.output_tokens <= fields["max_tokens"]
            if choice.finish_reason == "length":
                assert choice.output_tokens == fields["max_tokens"]
            if fields.get("ignore_eos") and choice.stop_reason is None:
                assert choice.output_tokens == fields["max_tokens"]


class TestTokens:
    @given(st.text(max_size=200))
    def test_encoding_and_back(self, text):
        if "\0" in text:  # leading zero bytes of a token are not told from none
            return
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.count(text) == len(ids) == -(-len(text.encode()) // 4)
        assert all(0 <= i < TOKENIZER.vocabulary for i in ids)

    @given(st.lists(st.tuples(st.sampled_from(["user", "system", "assistant"]), st.text(max_size=40)), max_size=6))
    def test_a_conversation_costs_its_contents_and_the_template(self, messages):
        ids = TOKENIZER.encode_chat(messages)
        assert len(ids) == TOKENIZER.count_chat(messages)
        contents = sum(TOKENIZER.count(content) for _, content in messages)
        assert len(ids) == contents + CHAT_TOKENS + GENERATION_TOKENS + MESSAGE_TOKENS * len(messages)

    @given(st.text(min_size=1, max_size=100).filter(lambda text: "\0" not in text))
    def test_over_the_api_as_well(self, text):
        told = parse_tokenize({"prompt": text, "return_token_strs": True}, RULES)
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        assert parse_detokenize({"tokens": told["tokens"]}, RULES) == {"prompt": text}


class TestWords:
    @given(st.integers(0, 2**32 - 1), st.integers(0, 300))
    def test_the_text_is_its_tokens(self, seed, tokens):
        words = Words(seed)
        text = words.text(tokens)
        assert text == "".join(words.at(i) for i in range(tokens))
        assert len(text.split()) == tokens

    @given(st.binary(max_size=50), st.integers(0, 2**31), st.integers(0, 8))
    def test_one_prompt_seed_and_choice_say_the_same_always(self, prompt, seed, choice):
        assert output_seed(prompt, seed, choice) == output_seed(prompt, seed, choice)

    def test_choices_and_seeds_differ(self):
        seeds = {output_seed(b"prompt", seed, choice) for seed in range(20) for choice in range(5)}
        assert len(seeds) == 100

    @given(st.floats(1.0, 2000.0), st.floats(0.05, 1.5), st.integers(0, 2**32 - 1))
    def test_lengths_are_at_least_one(self, median, sigma, seed):
        assert OutputLengths(median, sigma).tokens(seed) >= 1

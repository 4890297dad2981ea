"""Prefixes: what of two prompts is the same, who holds it, and how much is remembered."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools import prefixes
from pools.prefixes import BLOCK_BYTES, LONGEST_BLOCKS, Prefix, PrefixIndex, prefix_of

SYSTEM = {"role": "system", "content": "You are terse. " * 200}
KEY = b'"messages"'
AMPLE = 1 << 30  # tokens of KV cache


def chat(*contents, model="m", **more):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return json.dumps({"model": model, "messages": [SYSTEM, *turns], **more}).encode()


def common(one, other):
    pairs = zip(one.blocks, other.blocks, strict=False)
    return sum(a == b for a, b in pairs)


def test_a_later_turn_begins_as_the_one_before():
    first = prefix_of("m", chat("why? " * 300), KEY)
    second = prefix_of("m", chat("why? " * 300, "because " * 300, "and then?"), KEY)
    assert common(first, second) >= len(first.blocks) - 1  # the last block ended with what followed the prompt
    assert len(second.blocks) > len(first.blocks)


def test_prompts_share_the_system_prompt_and_part_after_it():
    bodies = [chat(word * 300) for word in ("why? ", "how? ")]
    one, other = (prefix_of("m", body, KEY) for body in bodies)
    shared = common(one, other)
    same = bodies[0][: bodies[0].index(b"why?")]
    assert shared == (len(same) - same.index(KEY)) // BLOCK_BYTES > 2
    assert one.blocks[shared:] != other.blocks[shared:]
    assert not set(one.blocks[shared:]) & set(other.blocks[shared:])  # a block stands for all before it


def test_what_comes_before_the_prompt_in_the_body_does_not_matter_but_the_model_does():
    messages = json.loads(chat("why? " * 300))["messages"]
    late = json.dumps({"stream": True, "max_tokens": 5, "messages": messages}).encode()
    early = json.dumps({"messages": messages}).encode()
    assert prefix_of("m", late, KEY).blocks == prefix_of("m", early, KEY).blocks
    assert not common(prefix_of("m", early, KEY), prefix_of("other", early, KEY))


def test_short_and_absent_prompts_have_none_and_long_ones_are_looked_at_so_far():
    assert prefix_of("m", b'{"messages": [{"role": "user", "content": "hi"}]}', KEY) is None
    assert prefix_of("m", b'{"prompt": "%b"}' % (b"x" * 9999), KEY) is None
    long = prefix_of("m", b'{"prompt": "%b"}' % (b"x" * 100_000), b'"prompt"')
    assert len(long.blocks) == LONGEST_BLOCKS
    assert long.cached_tokens(LONGEST_BLOCKS, 25_000) == pytest.approx(LONGEST_BLOCKS * BLOCK_BYTES / 4, rel=0.01)


def test_the_last_token_is_never_cached():
    assert Prefix((1, 2), 0.5).cached_tokens(2, 100) == 99.0
    assert Prefix((1, 2), 0.5).cached_tokens(1, 100) == 50.0


def test_the_index_tells_how_much_each_holds_from_the_beginning_on():
    index = PrefixIndex()
    assert index.match((1, 2)) == {}
    index.add("a", (1, 2, 3), AMPLE)
    index.add("b", (1, 2), AMPLE)
    index.add("c", (7, 2), AMPLE)
    assert index.match((1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert index.match((2, 3)) == {"a": 2, "b": 1, "c": 1}  # hashes stand for what is before them: this is no prompt
    assert index.match((9, 1)) == {}


def test_an_instance_forgets_what_it_was_given_first():
    index = PrefixIndex()
    tokens = 3 * BLOCK_BYTES // prefixes.BYTES_PER_TOKEN
    index.add("a", (1, 2), tokens)
    index.add("a", (3,), tokens)
    index.add("a", (1,), tokens)  # seen again, so 2 is the oldest
    index.add("a", (4,), tokens)
    assert (index.match((1,)), index.match((2,)), index.match((3,)), index.match((4,))) == (
        {"a": 1},
        {},
        {"a": 1},
        {"a": 1},
    )


def test_a_block_that_all_hold_is_looked_up_at_the_latest_few():
    index = PrefixIndex()
    for number in range(100):
        index.add(f"i{number}", (1,), AMPLE)
    assert list(index.match((1,))) == [f"i{number}" for number in range(92, 100)]
    assert len(index) == prefixes.BLOCK_HOLDERS


def test_many_instances_share_the_room(monkeypatch):
    monkeypatch.setattr(prefixes, "INDEX_BLOCKS", 1000)
    monkeypatch.setattr(prefixes, "LEAST_BLOCKS", 10)
    index = PrefixIndex()
    for turn in range(30):
        for number in range(20):
            index.add(f"i{number}", [hash((turn, number, k)) for k in range(20)], AMPLE)
    assert len(index) <= 1000


def test_those_that_are_gone_are_forgotten():
    index = PrefixIndex()
    index.add("a", (1, 2), AMPLE)
    index.add("b", (1,), AMPLE)
    index.keep({"b", "c"})
    assert index.match((1, 2)) == {"b": 1}
    index.keep(())
    assert (len(index), index._holders, index._blocks) == (0, {}, {})


names = st.sampled_from("abc")
chains = st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True)


@given(st.lists(st.tuples(names, chains), max_size=30), chains)
def test_with_room_for_all_it_is_what_was_given(given_chains, asked):
    index, held = PrefixIndex(), {name: set() for name in "abc"}
    for name, chain in given_chains:
        index.add(name, chain, AMPLE)
        held[name] |= set(chain)
    expected = {}
    for name, blocks in held.items():
        depth = next((k for k, block in enumerate(asked) if block not in blocks), len(asked))
        if depth:
            expected[name] = depth
    assert index.match(asked) == expected


@given(st.lists(st.tuples(names, chains, st.integers(1, 3)), max_size=40))
def test_its_two_sides_agree_and_its_bounds_hold(steps):
    index = PrefixIndex()
    for name, chain, blocks in steps:
        index.add(name, chain, blocks * BLOCK_BYTES // prefixes.BYTES_PER_TOKEN)
        assert len(index._blocks[name]) <= blocks
        sides = {(name, block) for name, held in index._blocks.items() for block in held}
        assert sides == {(name, block) for block, holders in index._holders.items() for name in holders}
        assert all(index._holders.values())

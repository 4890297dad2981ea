"""The multi-turn load: what it sends over real sockets, and what is made of what it saw."""

import asyncio
import json
import random

import pytest

from benchmarks.prefix_affinity import Round, Talk, Turn, gain, play, words

TALK = Talk(conversations=3, systems=2, turns=3, system_words=20, question_words=5, output_tokens=4, pause_s=0.001)


class Engine:
    """An HTTP server that answers every chat with four words, or with 500 if it is ``broken``."""

    def __init__(self, broken=False):
        self.broken = broken
        self.bodies = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        status = "500 Oops" if self.broken else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".encode())
        chunks = [{"choices": [{"delta": {"content": f"w{n} "}}]} for n in range(4)]
        chunks.append({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4}})
        for chunk in [] if self.broken else chunks:
            writer.write(b"data: %b\n\n" % json.dumps(chunk).encode())
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()


def played(broken=False, seed=0):
    async def scenario():
        out = Round(True, seed, 1.0, 30.0, 90.0, 600.0)
        async with Engine(broken) as engine:
            await play(engine.url, TALK, seed, out)
        return engine.bodies, out

    return asyncio.run(scenario())


def test_each_turn_begins_as_the_one_before_and_systems_are_shared():
    bodies, out = played()
    assert (len(bodies), len(out.turns), out.failures) == (9, 9, [])
    talks = {}
    for body in sorted(bodies, key=lambda body: len(body["messages"])):
        messages = body["messages"]
        talks.setdefault(json.dumps(messages[:2]), []).append(messages)
        assert (body["max_tokens"], body["ignore_eos"], messages[-1]["role"]) == (4, True, "user")
    assert len(talks) == 3
    for turns in talks.values():
        assert [len(messages) for messages in turns] == [2, 4, 6]
        assert turns[1][:2] == turns[0]
        assert turns[1][2] == {"role": "assistant", "content": "w0 w1 w2 w3 "}
    assert len({json.dumps(turns[0][0]) for turns in talks.values()}) == TALK.systems


def test_the_same_seed_says_the_same_and_another_does_not():
    def first_turns(seed):
        bodies, _ = played(seed=seed)
        return sorted(json.dumps(body["messages"]) for body in bodies if len(body["messages"]) == 2)

    assert first_turns(1) == first_turns(1)
    assert not set(first_turns(1)) & set(first_turns(2))


def test_a_conversation_ends_with_its_failure_which_is_told():
    bodies, out = played(broken=True)
    assert (len(bodies), out.turns, len(out.failures)) == (3, [], 3)


def test_a_round_is_summed_up():
    out = Round(True, 0, 12.0, 30.0, 90.0, 600.0, [], [])
    out.turns += [Turn(0, 0.4, 0.02, 10, "a"), Turn(1, 0.1, 0.02, 20, "b"), Turn(2, 0.1, 0.02, 0, "b")]
    told = out.summary()
    assert (told["hit_share"], told["turns"], told["prompt_tokens"], told["by_instance"]) == (0.3333, 3, 30, [2, 1])
    assert told["later_ttft_p50_s"] == 0.1
    assert told["ttft_mean_s"] == 0.2
    assert told["energy_j_per_turn"] == 200.0


def test_the_gain_is_a_share_of_what_was_without():
    without = Round(False, 0, 12.0, 10.0, 100.0, 800.0, [], [Turn(1, 0.4, 0.02, 10)]).summary()
    with_it = Round(True, 0, 12.0, 60.0, 100.0, 600.0, [], [Turn(1, 0.3, 0.02, 10)]).summary()
    told = gain([without, with_it])
    assert told["hit_share"] == pytest.approx(0.5)
    assert told["later_ttft_p50_s"] == pytest.approx(-0.25)
    assert told["energy_j_per_turn"] == pytest.approx(-0.25)
    assert told["tbt_mean_s"] == 0.0


def test_words_are_drawn():
    assert len(words(random.Random(0), 7).split()) == 7

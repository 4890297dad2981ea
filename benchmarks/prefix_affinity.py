"""What prefix affinity gains: conversations of several turns on real vLLM with emulated devices, with it and without.

``python -m benchmarks.prefix_affinity [--rounds 3] [--out benchmarks/results/prefix_affinity.json]``

Three servers (Llama 3.1 70B FP8 at TP2 on H100, emulated; KV blocks, prefix cache and its counters are vLLM's own) in
one pool, and two gateways attached to them, with affinity and without, which take turns: what else the machine does
falls on both. Each conversation has a system prompt it shares with some others and grows by a question and an answer
each turn; its next turn comes a pause after the last answer. The engines' caches are emptied before each round; both
gateways are given the same words. Hits are vLLM's ``prefix_cache_hits`` over ``prefix_cache_queries``; energy is what
the emulated GPUs' counters rose by, idle included. A first round of each is not counted.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.adapters.vllm_gateway import MODEL, VllmGateway, attached, counter_of, emulated_devices, served
from energy.adapters.catalogue import write_whole

OUT = Path(__file__).resolve().parent / "results" / "prefix_affinity.json"
INSTANCES, TP = 3, 2
TBT_SLO_S = 0.05  # one engine would not do then: where one has everything, every request finds its prefix
WORDS = ("return", "self", "value", "import", "class", "list", "string", "result", "index", "error", "line", "name")


@dataclass(frozen=True, slots=True)
class Talk:
    """The load. Lengths in words, about a token each."""

    conversations: int = 36
    systems: int = 6  # system prompts, shared alike
    turns: int = 6
    system_words: int = 600
    question_words: int = 150
    output_tokens: int = 64
    pause_s: float = 1.0  # mean, exponential


@dataclass(slots=True)
class Turn:
    """One answered turn."""

    turn: int
    ttft_s: float
    mean_tbt_s: float
    prompt_tokens: int
    instance: str = ""


@dataclass(slots=True)
class Round:
    """What one round showed."""

    affinity: bool
    seed: int
    wall_s: float
    hits: float
    queries: float
    energy_j: float
    failures: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Figures of the round; TTFT of the turns after the first, which no cache can help with but the system's."""
        given = Counter(turn.instance for turn in self.turns)
        later_s = [turn.ttft_s for turn in self.turns if turn.turn > 0]
        return {
            "affinity": self.affinity,
            "seed": self.seed,
            "turns": len(self.turns),
            "failures": len(self.failures),
            "by_instance": sorted(given.values(), reverse=True),
            "prompt_tokens": sum(turn.prompt_tokens for turn in self.turns),
            "hit_share": round(self.hits / max(self.queries, 1.0), 4),
            "ttft_mean_s": round(statistics.mean(turn.ttft_s for turn in self.turns), 4),
            "later_ttft_p50_s": round(float(np.percentile(later_s, 50)), 4),
            "later_ttft_p99_s": round(float(np.percentile(later_s, 99)), 4),
            "tbt_mean_s": round(statistics.mean(turn.mean_tbt_s for turn in self.turns), 5),
            "energy_j": round(self.energy_j, 1),
            "energy_j_per_turn": round(self.energy_j / max(len(self.turns), 1), 1),
            "wall_s": round(self.wall_s, 2),
        }


def words(rng: random.Random, count: int) -> str:
    """Text that no other draw begins with."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


class Talker:
    """One client with its conversation."""

    def __init__(self, http: httpx.AsyncClient, talk: Talk, system: str, rng: random.Random) -> None:
        self._http = http
        self._talk = talk
        self._rng = rng
        self._messages = [{"role": "system", "content": system}]

    async def run(self, out: Round) -> None:
        """All its turns, the first at a moment of its own."""
        for turn in range(self._talk.turns):
            await asyncio.sleep(self._rng.expovariate(1.0 / self._talk.pause_s))
            self._messages.append({"role": "user", "content": words(self._rng, self._talk.question_words)})
            try:
                answer = await self._ask(turn, out)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                out.failures.append(repr(error))
                return
            self._messages.append({"role": "assistant", "content": answer})

    async def _ask(self, turn: int, out: Round) -> str:
        body = {
            "messages": self._messages,
            "model": MODEL,
            "max_tokens": self._talk.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_s, seen_s, text = time.monotonic(), [], ""
        usage: dict[str, int] = {}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                if event["choices"]:
                    seen_s.append(time.monotonic())
                    text += event["choices"][0]["delta"].get("content") or ""
        tokens = usage["completion_tokens"]
        tbt_s = (seen_s[-1] - seen_s[0]) / max(tokens - 1, 1)
        instance = answer.headers.get("x-dynamollm-instance", "")
        out.turns.append(Turn(turn, seen_s[0] - sent_s, tbt_s, usage["prompt_tokens"], instance))
        return text


async def play(url: str, talk: Talk, seed: int, out: Round) -> None:
    """All conversations side by side."""
    rng = random.Random(seed)
    systems = [words(rng, talk.system_words) for _ in range(talk.systems)]
    limits = httpx.Limits(max_connections=2 * talk.conversations)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        talkers = [
            Talker(http, talk, systems[number % talk.systems], random.Random(f"{seed}/{number}"))
            for number in range(talk.conversations)
        ]
        await asyncio.gather(*(talker.run(out) for talker in talkers))


def measure(gateway: VllmGateway, through: str, talk: Talk, affinity: bool, seed: int) -> Round:
    """One round from empty caches, ``through`` a gateway's URL; ``gateway`` runs the engines and meters them."""
    urls = [instance["url"] for instance in gateway.status()["instances"]]
    for url in urls:
        httpx.post(f"{url}/reset_prefix_cache", timeout=30).raise_for_status()
    before = [sum(counter_of(url, f"prefix_cache_{name}_total") for url in urls) for name in ("hits", "queries")]
    before_j, began_s = gateway.status()["metered_j"], time.monotonic()
    out = Round(affinity, seed, 0.0, 0.0, 0.0, 0.0)
    asyncio.run(play(through, talk, seed, out))
    out.wall_s = time.monotonic() - began_s
    time.sleep(1.5)  # the meter is read once a second
    out.energy_j = gateway.status()["metered_j"] - before_j
    out.hits, out.queries = (
        sum(counter_of(url, f"prefix_cache_{name}_total") for url in urls) - was
        for name, was in zip(("hits", "queries"), before, strict=True)
    )
    return out


def gain(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Change by affinity, over all rounds: a share of what it was without, but for the hits, which are shares."""

    def mean(affinity: bool, key: str) -> float:
        return statistics.mean(float(r[key]) for r in rounds if r["affinity"] is affinity)

    keys = ("ttft_mean_s", "later_ttft_p50_s", "later_ttft_p99_s", "tbt_mean_s", "energy_j_per_turn")
    changes = {key: round(mean(True, key) / mean(False, key) - 1.0, 4) for key in keys}
    return {"hit_share": round(mean(True, "hit_share") - mean(False, "hit_share"), 4), **changes}


def main() -> None:
    """Measure with and without, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=Talk().conversations)
    parser.add_argument(
        "--engines", metavar="URL", help="a gateway that runs such engines already; else one is started"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    talk = Talk(conversations=given.conversations)
    rounds = []
    pools = [{"name": "LL", "request_class": "LL", "tp": TP, "instances": INSTANCES}]
    configuration = emulated_devices(pools, INSTANCES * TP, slo={"tbt_s": TBT_SLO_S})
    with contextlib.ExitStack() as stack:
        engines = VllmGateway(url=given.engines) if given.engines else stack.enter_context(served(configuration))
        urls = {
            affinity: stack.enter_context(
                served(attached(configuration, engines, routing={"prefix_affinity": affinity}))
            ).url
            for affinity in (False, True)
        }
        for seed in range(given.rounds + 1):
            order = (False, True) if seed % 2 else (True, False)
            for affinity in order:
                summary = measure(engines, urls[affinity], talk, affinity, seed).summary()
                print(json.dumps(summary), file=sys.stderr, flush=True)
                if seed:
                    rounds.append(summary)
    result = {
        "command": " ".join(["python -m benchmarks.prefix_affinity", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "talk": asdict(talk),
        "rounds": rounds,
        "gain": gain(rounds),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result["gain"], indent=1))


if __name__ == "__main__":
    main()

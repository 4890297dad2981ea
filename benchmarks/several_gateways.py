"""What it costs that several gateways know of each other only what was last reported: latency, imbalance, energy.

In virtual time: the product's routers, one for each gateway, over the engine model; requests reach a random gateway,
and gateways hear of each other's load as ``dynamollm.replica`` has them do, every so often. Beside it, one gateway
that sees all, gateways that hear nothing, that expect nothing of the others between two reports, and that look at two
instances drawn at random (power of two choices). All see the same requests, and know how long their answers will be:
nothing differs but what is known of the others. The table in docs/scaling.md is this command's.

    python -m benchmarks.several_gateways [--gateways 4] [--rate 20] [--instances 16] [--json FILE]
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

import click
import numpy as np

from energy.adapters.catalogue import load_profile
from energy.profile import EnergyProfile
from pools.classes import ClassSlos, RequestClass
from pools.instances import Instance, InstanceShape, InstanceState
from pools.peers import together
from pools.request import Assigned, Rejected, Request
from pools.router import Router
from pools.view import ClusterView, EngineLimits, InstanceView, PoolView
from simulator.batching import EngineLimits as BatchLimits
from simulator.engine import Engine
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.arrivals import Arrivals

BLOCK_TOKENS = 16
TICK_S = 0.05  # proxy.gateway.TICK_S
SAMPLE_S = 0.1
MODEL = "m"


@dataclass(frozen=True, slots=True)
class Mode:
    """How gateways know of each other."""

    name: str
    gateways: int
    hear_s: float | None  # None: never
    expect: bool = True  # that the others send where this one does, until they are heard again
    choices: int = 0  # instances looked at first, drawn at random; 0: all


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one mode made of the requests."""

    mode: str
    gateways: int
    hear_s: float | None
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    within_slo: float
    rejected: int
    imbalance: float  # standard deviation over mean of requests in flight on the instances, over time
    energy_j: float  # of a request, steps only


@dataclass(slots=True)
class Flight:
    """A request on its way."""

    request: Request
    gateway: int
    output_tokens: int
    first_s: float = float("nan")
    end_s: float = float("nan")


@dataclass(slots=True)
class World:
    """Gateways, engines and what is to happen, in order of time."""

    mode: Mode
    profile: EnergyProfile
    instances: int
    tp: int
    seed: int
    routers: list[Router] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    events: list[tuple[float, int, str, int]] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    rejected: int = 0
    energy_j: float = 0.0
    stepping: set[int] = field(default_factory=set)  # engines in a step

    def __post_init__(self) -> None:
        clock_mhz, tokens = self.profile.sm_clocks_mhz[-1], self.profile.kv_capacity_tokens(self.tp)
        step, shape = self.profile.step(self.tp, clock_mhz), InstanceShape(MODEL, self.profile.gpu, self.tp)
        views = tuple(
            InstanceView(
                Instance(f"i{n}", "all", shape, "http://h:1", InstanceState.READY, clock_mhz),
                step,
                EngineLimits(kv_capacity_tokens=tokens),
            )
            for n in range(self.instances)
        )
        view = ClusterView(1, 0.0, (PoolView("all", MODEL, RequestClass.LL),), views)
        limits = BatchLimits(tokens // BLOCK_TOKENS, block_tokens=BLOCK_TOKENS)
        self.engines = [Engine(limits, step) for _ in views]
        self.routers = [Router() for _ in range(self.mode.gateways)]
        for router in self.routers:
            router.update(view, 0.0)

    def run(self, arrivals: Arrivals) -> Outcome:
        """Play all requests to their end."""
        random, order, slos = np.random.default_rng(self.seed), count(), ClassSlos()
        at = random.integers(0, self.mode.gateways, len(arrivals)).tolist()
        columns = zip(arrivals.arrival_s.tolist(), arrivals.input_tokens, arrivals.output_tokens, at, strict=True)
        for n, (arrival_s, input_tokens, output_tokens, gateway) in enumerate(columns):
            request_class = slos.cuts.classify(int(input_tokens), float(output_tokens))
            slo = slos.slo(request_class, int(input_tokens))
            request = Request(
                str(n), MODEL, arrival_s, int(input_tokens), float(output_tokens), request_class, slo, streamed=True
            )
            self.flights[n] = Flight(request, gateway, int(output_tokens))
            heappush(self.events, (arrival_s, next(order), "arrive", n))
        end_s = float(arrivals.arrival_s[-1]) if len(arrivals) else 0.0
        for what, period_s in (("tick", TICK_S), ("sample", SAMPLE_S), ("hear", self.mode.hear_s)):
            if period_s is not None:
                for at_s in np.arange(period_s, end_s, period_s).tolist():
                    heappush(self.events, (at_s, next(order), what, 0))
        while self.events:
            now_s, _, what, n = heappop(self.events)
            match what:
                case "arrive":
                    self._arrive(n, now_s, random)
                case "step":
                    self._finish_step(n, now_s)
                case "tick":
                    self._tick(now_s)
                case "hear":
                    self._hear(now_s)
                case _:
                    self._sample()
            for begun, engine in enumerate(self.engines):
                if begun not in self.stepping and (step := engine.start_step(now_s)) is not None:
                    self.energy_j += step.power_w * step.duration_s * self.tp
                    self.stepping.add(begun)
                    heappush(self.events, (now_s + step.duration_s, next(order), "step", begun))
        return self._outcome(len(arrivals))

    # --- what happens ------------------------------------------------------------------------------------------------

    def _arrive(self, n: int, now_s: float, random: np.random.Generator) -> None:
        flight = self.flights[n]
        router = self.routers[flight.gateway]
        if self.mode.choices:
            drawn = random.choice(self.instances, self.mode.choices, replace=False)
            others = frozenset(f"i{k}" for k in range(self.instances)) - {f"i{k}" for k in drawn.tolist()}
            decision = router.route(flight.request, now_s, others)
            if isinstance(decision, Assigned):
                self._send(n, decision, now_s)
                return
            router.on_cancelled(flight.request.id, now_s)
        self._decide(n, router.route(flight.request, now_s), now_s)

    def _decide(self, n: int, decision: object, now_s: float) -> None:
        if isinstance(decision, Assigned):
            self._send(n, decision, now_s)
        elif isinstance(decision, Rejected):
            self.rejected += 1

    def _send(self, n: int, decision: Assigned, now_s: float) -> None:
        request = self.flights[n].request
        self.engines[int(decision.instance_id[1:])].submit(
            n, request.input_tokens, self.flights[n].output_tokens, now_s
        )

    def _finish_step(self, engine: int, now_s: float) -> None:
        self.stepping.discard(engine)
        result = self.engines[engine].finish_step()
        for n in result.emitted:
            flight = self.flights[n]
            if not flight.first_s <= now_s:
                flight.first_s = now_s
                self.routers[flight.gateway].on_first_token(flight.request.id, now_s)
        for n in result.finished:
            flight = self.flights[n]
            flight.end_s = now_s
            self.routers[flight.gateway].on_finished(flight.request.id, flight.output_tokens, now_s)
            self._release(flight.gateway, now_s)

    def _tick(self, now_s: float) -> None:
        for gateway, router in enumerate(self.routers):
            for moved in router.escalate(now_s):
                for engine in self.engines:
                    engine.abort(int(moved.request.id))
                self._decide(int(moved.request.id), moved.decision, now_s)
            self._release(gateway, now_s)

    def _release(self, gateway: int, now_s: float) -> None:
        router = self.routers[gateway]
        while released := router.release(now_s) if router.next_release_s < float("inf") else []:
            for request, decision in released:
                self._decide(int(request.id), decision, now_s)

    def _hear(self, now_s: float) -> None:
        own = [router.fleet.own() for router in self.routers]
        for k, router in enumerate(self.routers):
            expected = len(own) - 1 if self.mode.expect else 0
            router.hear(together(own[:k] + own[k + 1 :]), now_s, expected)

    def _sample(self) -> None:
        on = np.array([engine.running + engine.waiting for engine in self.engines], dtype=np.float64)
        if on.sum() > 0:
            self.spread.append(float(on.std() / on.mean()))

    def _outcome(self, requests: int) -> Outcome:
        ended = [flight for flight in self.flights.values() if flight.end_s == flight.end_s]
        ttft_s = np.array([f.first_s - f.request.arrival_s for f in ended])
        tpot_s = np.array([(f.end_s - f.first_s) / max(f.output_tokens - 1, 1) for f in ended])
        within = [
            ttft <= f.request.slo.ttft_s and tpot <= f.request.slo.tbt_s
            for f, ttft, tpot in zip(ended, ttft_s, tpot_s, strict=True)
        ]
        return Outcome(
            mode=self.mode.name,
            gateways=self.mode.gateways,
            hear_s=self.mode.hear_s,
            requests=requests,
            ttft_p50_s=float(np.quantile(ttft_s, 0.5)),
            ttft_p99_s=float(np.quantile(ttft_s, 0.99)),
            tpot_p99_s=float(np.quantile(tpot_s, 0.99)),
            within_slo=sum(within) / requests,
            rejected=self.rejected,
            imbalance=float(np.mean(self.spread)),
            energy_j=self.energy_j / requests,
        )


def modes(gateways: int) -> list[Mode]:
    """One that sees all, and several that see less and less."""
    return [
        Mode("one gateway, sees all", 1, None),
        Mode("hear and expect", gateways, 0.05),
        Mode("hear and expect", gateways, 0.25),
        Mode("hear and expect", gateways, 1.0),
        Mode("hear", gateways, 0.25, expect=False),
        Mode("hear, two choices", gateways, 0.25, expect=False, choices=2),
        Mode("hear nothing", gateways, None),
    ]


def poisson(rate_rps: float, duration_s: float, seed: int, trace: str = "synthetic-conv") -> Arrivals:
    """Requests with the lengths of a workload, coming at random at a steady rate."""
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1.0 / rate_rps, round(rate_rps * duration_s)))
    chunks = list(open_workload(trace, seed).begin())
    lengths = Arrivals.joined(chunks).at(slice(0, len(arrival_s)))
    repeats = -(-len(arrival_s) // len(lengths))
    return Arrivals(
        arrival_s,
        np.tile(lengths.input_tokens, repeats)[: len(arrival_s)],
        np.tile(lengths.output_tokens, repeats)[: len(arrival_s)],
    )


def compare(
    profile: EnergyProfile, compared: Sequence[Mode], arrivals: Arrivals, instances: int, tp: int, seed: int
) -> list[Outcome]:
    """Every mode over the same requests."""
    return [World(mode, profile, instances, tp, seed).run(arrivals) for mode in compared]


@click.command()
@click.option("--gateways", default=4, show_default=True)
@click.option("--rate", "rates_rps", multiple=True, type=float, default=(20.0, 60.0), show_default=True)
@click.option("--instances", default=16, show_default=True)
@click.option("--tp", default=4, show_default=True)
@click.option("--duration", "duration_s", default=120.0, show_default=True)
@click.option("--profile", "profile_name", default="llama-3.1-70b-fp8-h100", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcomes here.")
def main(
    gateways: int,
    rates_rps: tuple[float, ...],
    instances: int,
    tp: int,
    duration_s: float,
    profile_name: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Compare what gateways know of each other."""
    profile = load_profile(profile_name)
    results = []
    click.echo(f"{instances} instances TP{tp}, {duration_s:g} s, seed {seed}")
    click.echo(
        "| requests/s | gateways | | hear every s | TTFT P50 ms | TTFT P99 ms | TPOT P99 ms | within SLO | rejected "
        "| imbalance | J/request |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|---|")
    for rate_rps in rates_rps:
        for o in compare(profile, modes(gateways), poisson(rate_rps, duration_s, seed), instances, tp, seed):
            results.append({"rate_rps": rate_rps, **asdict(o)})
            click.echo(
                f"| {rate_rps:g} | {o.gateways} | {o.mode} | {'-' if o.hear_s is None else f'{o.hear_s:g}'} "
                f"| {1e3 * o.ttft_p50_s:.0f} | {1e3 * o.ttft_p99_s:.0f} | {1e3 * o.tpot_p99_s:.1f} "
                f"| {o.within_slo:.2%} | {o.rejected} | {o.imbalance:.2f} | {o.energy_j:.0f} |"
            )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

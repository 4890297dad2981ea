"""What a routing decision costs: the real Router over a pretend fleet in virtual time, each call timed alone.

Every request is routed, starts and ends as the router's own predictions say, so the fleet is as full as the arrival
rate makes it. Targets: P99 of ``route`` at most 10 us with 32 instances and 50 us with 1,024, at the steady load.

    python -m benchmarks.router_cost [--requests 20000] [--repeats 8] [--json]

A run is deterministic, so it is repeated and of each call the quickest of the repeats counts: what the call costs,
without what other processes took from it. ``raw P99`` is of all calls of all repeats as they were.
"""

import gc
import json
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from time import perf_counter_ns

import click
import numpy as np

from energy.adapters.catalogue import load_profile
from energy.profile import EnergyProfile, StepCoefficients, step_time_s
from pools.classes import REQUEST_CLASSES, ClassSlos, RequestClass
from pools.instances import Instance, InstanceShape, InstanceState
from pools.prefixes import BLOCK_BYTES, BYTES_PER_TOKEN, LONGEST_BLOCKS, Prefix, prefix_of
from pools.request import Assigned, Request
from pools.router import Router
from pools.view import ClusterView, EngineLimits, InstanceView, PoolView

MODEL = "llama"
FILLED_S = 20.0  # of arrivals at least: longer than most answers take
# P99 targets of the gateway, by fleet size
TARGET_US = {32: 10.0, 1024: 50.0}
# Share of each class in the hour of Azure Conversation, as the paper reports it
MIX = (0.14, 0.18, 0.01, 0.05, 0.06, 0.22, 0.14, 0.09, 0.11)
INPUT_TOKENS = ((32, 256), (256, 1024), (1024, 8192))
OUTPUT_TOKENS = ((8, 100), (100, 350), (350, 1000))


@dataclass(frozen=True, slots=True)
class Cost:
    """Times of one call, over all calls of one run."""

    call: str
    instances: int
    load: str
    calls: int
    p50_us: float
    p99_us: float
    raw_p99_us: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet and how hard it is driven."""

    instances: int
    pools: int  # 9, one a class; or 1, kept for LL
    rate_rps_per_instance: float
    name: str
    prefixes: bool = False  # requests are turns of conversations, a fifth as many as there are requests


SCENARIOS = (
    Scenario(32, 9, 1.5, "steady"),
    Scenario(32, 9, 12.0, "saturated"),
    Scenario(1024, 9, 1.5, "steady"),
    Scenario(1024, 9, 12.0, "saturated"),
    Scenario(1024, 1, 1.5, "steady, one pool"),
    Scenario(32, 9, 1.5, "steady, prefixes", prefixes=True),
    Scenario(1024, 9, 1.5, "steady, prefixes", prefixes=True),
)
PROMPT_BYTES = (4096, 32_768)  # of which the prefix is worked out, before a request is routed


def fleet_view(profile: EnergyProfile, instances: int, pools: int) -> ClusterView:
    """A view of TP8 instances dealt out over pools in proportion to the work of the mix, at least one each."""
    clock = profile.sm_clocks_mhz[-1]
    step, limits = profile.step(8, clock), EngineLimits(kv_capacity_tokens=profile.kv_capacity_tokens(8))
    classes = REQUEST_CLASSES if pools == 9 else (RequestClass.LL,)
    work_s = np.array([share * _work_s(step, c) for share, c in zip(MIX, REQUEST_CLASSES, strict=True)][-pools:])
    counts = np.maximum(1, np.floor(work_s / work_s.sum() * instances)).astype(int)
    counts[-1] += instances - counts.sum()
    shape = InstanceShape(MODEL, profile.gpu, 8)
    views = [
        InstanceView(Instance(f"{c.name}-{k}", c.name, shape, "", InstanceState.READY, clock), step, limits)
        for c, count in zip(classes, counts, strict=True)
        for k in range(count)
    ]
    return ClusterView(1, 0.0, tuple(PoolView(c.name, MODEL, c) for c in classes), tuple(views))


def _work_s(step: StepCoefficients, request_class: RequestClass) -> float:
    """Time of an instance that a mean request of a class takes, sharing its decode steps with 15 others."""
    input_tokens = sum(INPUT_TOKENS[request_class.input_size]) / 2
    output_tokens = sum(OUTPUT_TOKENS[request_class.output_size]) / 2
    prefill_s = step_time_s(step, input_tokens, input_tokens**2 / 2, 0.0, 0.0)
    return prefill_s + output_tokens * step_time_s(step, 0.0, 0.0, 16.0, 16.0 * input_tokens) / 16.0


def requests_of(scenario: Scenario, count: int, seed: int) -> list[Request]:
    """Poisson arrivals of the mix, lengths uniform inside each class."""
    random = np.random.default_rng(seed)
    arrivals_s = np.cumsum(random.exponential(1.0 / (scenario.instances * scenario.rate_rps_per_instance), count))
    classes = random.choice(9, size=count, p=MIX)
    slos = ClassSlos()
    made = []
    for n in range(count):
        request_class = REQUEST_CLASSES[classes[n]]
        input_tokens = int(random.integers(*INPUT_TOKENS[request_class.input_size]))
        output_tokens = float(random.integers(*OUTPUT_TOKENS[request_class.output_size]))
        slo = slos.slo(request_class, input_tokens)
        prefix = turn_of(n, count, input_tokens) if scenario.prefixes else None
        made.append(
            Request(str(n), MODEL, float(arrivals_s[n]), input_tokens, output_tokens, request_class, slo, prefix=prefix)
        )
    return made


def turn_of(number: int, count: int, input_tokens: int) -> Prefix | None:
    """The prefix of one turn: as many blocks as its length has, of the conversation whose turn it is."""
    blocks = min(input_tokens * BYTES_PER_TOKEN // BLOCK_BYTES, LONGEST_BLOCKS)
    if not blocks:
        return None
    conversation = number % max(count // 5, 1)
    first = conversation * LONGEST_BLOCKS
    return Prefix(tuple(range(first, first + blocks)), BLOCK_BYTES / (input_tokens * BYTES_PER_TOKEN))


def measure_prefixes(repeats: int) -> list[Cost]:
    """What working out a prefix costs, by the size of the prompt."""
    costs = []
    for size in PROMPT_BYTES:
        body = b'{"messages": [{"role": "user", "content": "%b"}]}' % (b"why? " * (size // 5))
        times = []
        for _ in range(1000 * repeats):
            start = perf_counter_ns()
            prefix_of(MODEL, body, b'"messages"')
            times.append((perf_counter_ns() - start) / 1e3)
        quickest = np.array(times).reshape(repeats, 1000).min(axis=0)
        p50, p99 = np.percentile(quickest, (50, 99))
        raw_p99 = float(np.percentile(times, 99))
        costs.append(Cost("prefix", 0, f"prompt of {size // 1024} KiB", 1000, float(p50), float(p99), raw_p99))
    return costs


def measure(profile: EnergyProfile, scenario: Scenario, count: int, seed: int, repeats: int) -> list[Cost]:
    """Run a scenario several times; the first fifth fills the fleet and is not counted."""
    count = max(count, int(FILLED_S * scenario.rate_rps_per_instance * scenario.instances))
    runs = [run(profile, scenario, count, seed) for _ in range(repeats)]
    costs = []
    for call in runs[0]:
        us = np.array([times[call][len(times[call]) // 5 :] for times in runs]) / 1e3
        p50, p99 = np.percentile(us.min(axis=0), (50, 99))
        raw_p99 = float(np.percentile(us, 99))
        costs.append(Cost(call, scenario.instances, scenario.name, us.shape[1], float(p50), float(p99), raw_p99))
    return costs


def run(profile: EnergyProfile, scenario: Scenario, count: int, seed: int) -> dict[str, list[int]]:
    """The time of every call of one run in ns, by the name of the call."""
    router = Router()
    router.update(fleet_view(profile, scenario.instances, scenario.pools), 0.0)
    times: dict[str, list[int]] = {"route": [], "first token": [], "finished + release": []}
    ends: list[tuple[float, int, bool, Request, str]] = []
    requests = requests_of(scenario, count, seed)
    counter = iter(range(10 * count))

    def sent(request: Request, answer: Assigned, now_s: float) -> None:
        i = router.fleet.index[answer.instance_id]
        load = router.fleet.load
        first_s = max(load.prefill_done_s[i], now_s)
        heappush(ends, (first_s, next(counter), False, request, answer.instance_id))
        end_s = first_s + request.output_tokens * load.step_s[i]
        heappush(ends, (end_s, next(counter), True, request, answer.instance_id))

    gc.collect()
    gc.freeze()
    for request in requests:
        now_s = request.arrival_s
        while ends and ends[0][0] <= now_s:
            at_s, _, ended, other, _ = heappop(ends)
            start = perf_counter_ns()
            if ended:
                router.on_finished(other.id, int(other.output_tokens), at_s)
                released = router.release(at_s)
                times["finished + release"].append(perf_counter_ns() - start)
                for waited, answer in released:
                    if isinstance(answer, Assigned):
                        sent(waited, answer, at_s)
            else:
                router.on_first_token(other.id, at_s)
                times["first token"].append(perf_counter_ns() - start)
        start = perf_counter_ns()
        decision = router.route(request, now_s)
        times["route"].append(perf_counter_ns() - start)
        if isinstance(decision, Assigned):
            sent(request, decision, now_s)
    return times


@click.command()
@click.option("--requests", default=20_000, show_default=True, help="Requests of each scenario, at least.")
@click.option("--repeats", default=8, show_default=True, help="Runs of each scenario.")
@click.option("--profile", "profile_name", default="llama-3.1-70b-fp8-h100", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(requests: int, repeats: int, profile_name: str, seed: int, as_json: bool) -> None:
    """Measure what a routing decision costs."""
    profile = load_profile(profile_name)
    costs = [cost for scenario in SCENARIOS for cost in measure(profile, scenario, requests, seed, repeats)]
    costs += measure_prefixes(repeats)
    if as_json:
        click.echo(json.dumps([asdict(c) for c in costs], indent=2))
        return
    click.echo(f"{'instances':>9}  {'load':<18}{'call':<20}{'P50 us':>8}{'P99 us':>8}{'raw P99':>9}  target")
    for c in costs:
        target = TARGET_US[c.instances] if c.call == "route" and c.load == "steady" else None
        verdict = "" if target is None else f"<= {target:g} {'met' if c.p99_us <= target else 'MISSED'}"
        times = f"{c.p50_us:>8.1f}{c.p99_us:>8.1f}{c.raw_p99_us:>9.1f}"
        click.echo(f"{c.instances:>9}  {c.load:<18}{c.call:<20}{times}  {verdict}")


if __name__ == "__main__":
    main()

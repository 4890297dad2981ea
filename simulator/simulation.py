"""Simulation: one workload under one controller in virtual time.

The driver owns what is slow and rare (ticks, instances that start and stop, routes, samples); between two such moments
the compiled loop (``simulator.kernel``) runs alone. A controller is the product's own: it gets an ``Observation`` and
its actions are carried out with their delays. The order at one moment: engine events, arrivals, effects of earlier
actions, samples, the tick. One seed gives one result.

The first tick comes before the first arrival and its actions take no time: an experiment begins in a running cluster.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pools.classes import REQUEST_CLASSES
from pools.instances import InstanceState
from pools.routes import routes_of
from pools.view import ClusterView, PoolView
from simulator.cluster import SimulatedCluster
from simulator.compiled import compile_trees
from simulator.kernel import CHUNK, EMPTY, energy_until, reclock, run_loop, serve_lanes
from simulator.operating import OperatingPoints
from simulator.results import RunResult, Series
from simulator.setup import SimulationSetup
from simulator.workload.arrivals import Arrivals as Requests
from simulator.workload.arrivals import Workload
from simulator.world import Arrivals, World, make_world
from solver.control import (
    STATE_CODE,
    ClusterState,
    Controller,
    Demand,
    InstanceViews,
    Level,
    Observation,
    Route,
    Tick,
)

PRIMING_S = 300.0  # of the workload that the first tick is shown, as if it had just been seen
AFTER_END_S = 1.0  # how often it is looked whether the last request has been answered


@dataclass(frozen=True, slots=True)
class Compiled:
    """The compiled functions, made once a process."""

    run_loop: Callable[..., tuple[int, int, int]]
    serve_lanes: Callable[..., None]
    reclock: Callable[..., None]
    energy_until: Callable[..., None]


_compiled: list[Compiled] = []


def compiled() -> Compiled:
    """Compile (or load from the cache on disk) at the first use."""
    if not _compiled:
        _compiled.append(Compiled(*compile_trees(run_loop, serve_lanes, reclock, energy_until)))
    return _compiled[0]


class Simulation:
    """One run; use ``simulate``."""

    def __init__(self, setup: SimulationSetup, workload: Workload, controller: Controller, seed: int) -> None:
        self.setup = setup
        self.workload = workload
        self.controller = controller
        self.now_s = 0.0
        self._foretell = setup.prediction.begin(setup.slos.cuts, np.random.default_rng(seed))
        self._functions = compiled()
        points = OperatingPoints(setup.profile, setup.supported_mhz)
        self.world: World = make_world(points.table)
        self.world.routing.policy[:] = (
            setup.weights.spread,
            setup.weights.margin,
            setup.queue.max_depth,
            setup.queue.ttl_s,
            0.05,
        )
        self.cluster = SimulatedCluster(
            setup.profile,
            setup.nodes,
            setup.gpus_per_node,
            [pool.name for pool in setup.pools],
            self.world,
            points,
            setup.limits,
            setup.delays,
            self._functions.reclock,
            setup.empty_nodes_off,
        )
        self._chunks: Iterator[Requests] = iter(workload.chunks())
        self._arrivals, self._cursor, self._more = _no_arrivals(), 0, True
        self._due = Tick(float("inf"), Level.INSTANCE)
        self._next_sample_s = setup.sample_s
        self._tick_s = 0.0
        self._tick_energy = np.zeros(len(self.world.engines.mode))
        self._samples = Samples(setup.profile.tensor_parallel)
        self._routed: tuple[frozenset[str], Route | None] | None = None
        self.diagnostics: list[tuple[float, Any]] = []

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the first tick to the last token."""
        self.begin()
        self.advance(self.workload.duration_s)
        while not self._finished():
            self.advance(self.now_s + AFTER_END_S)
        self._reject_waiting()
        self._sample()

    def begin(self) -> None:
        """The first tick."""
        self._due = self._first_tick()
        self._next_sample_s = self.setup.sample_s

    def advance(self, until_s: float) -> None:
        """Go on to that time."""
        while self.now_s < until_s:
            self._go_to(min(self._due.at_s, self.cluster.next_effect_s, self._next_sample_s, until_s))
            self.cluster.run_effects(self.now_s)
            self._follow_changes()
            if self.now_s >= self._next_sample_s:
                self._sample()
                self._next_sample_s += self.setup.sample_s
            if self.now_s >= self._due.at_s:
                self._due = self._tick(self._due)

    def feed(self, requests: Requests) -> None:
        """More requests, for a workload that is not known beforehand: all that come before the next ``advance`` ends.

        Raises ``ValueError`` for one that came before now.
        """
        if len(requests) and float(requests.arrival_s[0]) < self.now_s:
            raise ValueError(f"a request of {requests.arrival_s[0]} s comes after {self.now_s} s were simulated")
        self._arrivals, self._cursor, self._more = self._annotate(requests), 0, False

    def _finished(self) -> bool:
        """Whether every request has been answered (those that nobody will ever take do not count)."""
        if self._more or self._cursor < len(self._arrivals.arrival_s):
            return False
        flights = self.world.flights
        in_flight = len(flights.free) - int(flights.free_count[0])
        return in_flight == int(self.world.routing.waiting[0])

    def _go_to(self, until_s: float) -> None:
        """Let the compiled loop run to that time."""
        loop = self._functions.run_loop
        while True:
            why, self._cursor, row = loop(
                self.world.record, self.setup.limits, self._arrivals, self._cursor, self._more, until_s
            )
            if why == CHUNK:
                self._next_chunk()
            elif why == EMPTY:
                self.now_s = float(self.world.engines.begin_s[row])
                self.cluster.emptied(row, self.now_s)
                self._follow_changes()
            else:
                self.now_s = until_s
                return

    def _next_chunk(self) -> None:
        requests = next(self._chunks, None)
        if requests is None:
            self._arrivals, self._more = _no_arrivals(), False
        else:
            self._arrivals = self._annotate(requests)
        self._cursor = 0

    def _annotate(self, requests: Requests) -> Arrivals:
        """Add what the gateway works out: predicted length, classes, SLO."""
        slos = self.setup.slos
        cuts = slos.cuts
        inputs = requests.input_tokens.astype(np.int64)
        outputs = requests.output_tokens.astype(np.int64)
        input_size = np.searchsorted(np.asarray(cuts.input_tokens), inputs, side="right")
        output_size = np.searchsorted(np.asarray(cuts.output_tokens), outputs, side="right")
        predicted_size, predicted_tokens = self._foretell(requests)
        beyond = np.maximum(inputs / cuts.longest_input_tokens, 1.0)
        return Arrivals(
            arrival_s=requests.arrival_s.astype(np.float64),
            input_tokens=inputs,
            output_tokens=outputs,
            predicted_tokens=predicted_tokens,
            request_class=3 * input_size + output_size,
            routed_class=3 * input_size + predicted_size,
            ttft_slo_s=np.asarray(slos.ttft_s)[input_size] * beyond,
            tbt_slo_s=np.full(len(inputs), slos.tbt_s),
        )

    # --- the controller ----------------------------------------------------------------------------------------------

    def _first_tick(self) -> Tick:
        tick = self.controller.first_tick(0.0)
        if tick.at_s > 0.0:
            return tick
        effects = self.controller.on_tick(tick, self._observe(self._priming_demand()))
        for action in effects.actions:
            self.cluster.apply(action, 0.0, warm=True)
        self.cluster.run_effects(0.0)
        self._follow_changes()
        self.diagnostics += [(0.0, d) for d in effects.diagnostics]
        return effects.next_tick

    def _priming_demand(self) -> Demand:
        """What the first minutes of the workload will ask for."""
        if self._more and len(self._arrivals.arrival_s) == 0:
            self._next_chunk()
        a = self._arrivals
        seen = a.arrival_s <= PRIMING_S
        window_s = PRIMING_S
        if seen.all() and len(seen):
            window_s = max(float(a.arrival_s[-1]), 1.0)
        k = a.routed_class[seen]
        classes = len(REQUEST_CLASSES)
        return Demand(
            window_s=window_s,
            requests=np.bincount(k, minlength=classes).astype(np.float64),
            input_tokens=np.bincount(k, weights=a.input_tokens[seen], minlength=classes).astype(np.float64),
            output_tokens=np.bincount(k, weights=a.predicted_tokens[seen], minlength=classes).astype(np.float64),
            queued=np.zeros(classes),
        )

    def _tick(self, tick: Tick) -> Tick:
        effects = self.controller.on_tick(tick, self._observe(self._window_demand()))
        for action in effects.actions:
            self.cluster.apply(action, self.now_s)
        self._follow_changes()
        self.diagnostics += [(self.now_s, d) for d in effects.diagnostics]
        if effects.next_tick.at_s <= self.now_s:
            raise ValueError(
                f"tick at {self.now_s} s asks to be called again at {effects.next_tick.at_s} s, in its past"
            )
        return effects.next_tick

    def _window_demand(self) -> Demand:
        ledger = self.world.ledger
        demand = Demand(
            window_s=self.now_s - self._tick_s,
            requests=ledger.window_requests.astype(np.float64),
            input_tokens=ledger.window_input.copy(),
            output_tokens=ledger.window_output.copy(),
            queued=self.world.routing.depth.astype(np.float64),
        )
        ledger.window_requests[:] = 0
        ledger.window_input[:] = 0.0
        ledger.window_output[:] = 0.0
        return demand

    def _observe(self, demand: Demand) -> Observation:
        cluster, x, load, batch = self.cluster, self.world.engines, self.world.load, self.world.batch
        rows = np.fromiter((i.row for i in cluster.instances.values()), np.int64, len(cluster.instances))
        window_s = max(self.now_s - self._tick_s, 1e-9)
        energy_j = self._energy_of(rows).sum(axis=1)
        worst = x.worst_share[rows]
        blocks = cluster.row_blocks[rows]
        views = InstanceViews(
            ids=tuple(cluster.instances),
            pool=x.pool[rows],
            node=cluster.row_node[rows],
            tp=x.tp[rows],
            state=cluster.row_state[rows],
            sm_clock_mhz=cluster.row_clock_mhz[rows],
            ready_at_s=cluster.row_ready_at_s[rows],
            class_rate_rps=x.class_arrivals[rows] / window_s,
            running=np.asarray(batch.running_count)[rows].astype(np.float64),
            waiting=np.asarray(batch.waiting_count)[rows].astype(np.float64),
            waiting_tokens=np.asarray(load.pending_tokens)[rows],
            context_tokens=(blocks - np.asarray(batch.free_blocks)[rows]) * self.setup.limits.block_tokens,
            slo_slack=np.where(worst < 0.0, np.nan, 1.0 - worst),
            late_rps=x.late[rows] / window_s,
            power_w=(energy_j - self._tick_energy[rows]) / window_s,
        )
        x.class_arrivals[rows] = 0
        x.worst_share[rows] = -1.0
        x.late[rows] = 0
        self._tick_energy[rows] = energy_j
        self._tick_s = self.now_s
        nodes = len(cluster.node_names)
        state = ClusterState(
            at_s=self.now_s,
            pools=cluster.pools,
            node_names=cluster.node_names,
            node_gpus=np.full(nodes, self.setup.gpus_per_node, dtype=np.int64),
            node_usable=np.ones(nodes, dtype=np.bool_),
            instances=views,
        )
        return Observation(self.now_s, state, demand)

    def _energy_of(self, rows: Any) -> Any:
        """(n, 3) prefill, decode and idle joules of engine rows until now; 0 for rows that run no engine."""
        out = np.zeros((len(rows), 3))
        state = self.cluster.row_state[rows]
        serving = (state == STATE_CODE[InstanceState.READY]) | (state == STATE_CODE[InstanceState.DRAINING])
        part = np.zeros((int(serving.sum()), 3))
        self._functions.energy_until(self.world.record, rows[serving], self.now_s, part)
        out[serving] = part
        return out

    # --- routes ------------------------------------------------------------------------------------------------------

    def _follow_changes(self) -> None:
        """After instances came, went or changed clock: candidates and routes anew, and try those waiting."""
        if not (self.cluster.routes_changed or self.cluster.clocks_changed):
            return
        if self.cluster.routes_changed:
            self._fill_members()
            self._fill_routes()
        self._find_fastest()
        self.cluster.routes_changed = self.cluster.clocks_changed = False
        if self.world.routing.waiting[0]:
            self._functions.serve_lanes(self.world.record, self.setup.limits, self.now_s)

    def _fill_members(self) -> None:
        routing = self.world.routing
        members: list[list[int]] = [[] for _ in self.cluster.pools]
        for instance in self.cluster.instances.values():
            if instance.state is InstanceState.READY:
                members[instance.pool].append(instance.row)
        for p, rows in enumerate(members):
            windows = -(-len(rows) // 32)
            routing.member_count[p] = len(rows)
            routing.members[p, : len(rows)] = [row for k in range(windows) for row in rows[k::windows]]

    def _find_fastest(self) -> None:
        """The member of each pool that reads a prompt soonest."""
        routing, token_s = self.world.routing, np.asarray(self.world.costs.token_s)
        for p in np.flatnonzero(routing.member_count):
            rows = routing.members[p, : routing.member_count[p]]
            routing.fastest[p] = rows[token_s[rows].argmin()]

    def _fill_routes(self) -> None:
        routing = self.world.routing
        names = self.cluster.pools
        served = frozenset(name for p, name in enumerate(names) if routing.member_count[p])
        if self._routed == (served, self.cluster.route):
            return
        self._routed = (served, self.cluster.route)
        view = ClusterView(
            version=0,
            as_of_s=self.now_s,
            pools=tuple(PoolView(pool.name, "model", pool.request_class) for pool in self.setup.pools),
            instances=(),
            shares=self._shares(),
        )
        for k, route in enumerate(routes_of(view, served)["model"]):
            order = [names.index(name) for name in (*route.first, *route.then) if name in served]
            firsts = [(names.index(n), w) for n, w in zip(route.first, route.weights, strict=True) if n in served]
            routing.pool_count[k] = len(order)
            routing.pools[k, : len(order)] = order
            if routing.first_count[k] != len(firsts) or any(
                routing.weight[k, index] != weight for index, (_, weight) in enumerate(firsts)
            ):
                routing.credit[k] = 0.0
            routing.first_count[k] = len(firsts)
            routing.weight[k, : len(firsts)] = [weight for _, weight in firsts]

    def _shares(self) -> dict[tuple[str, Any], tuple[tuple[str, float], ...]]:
        route = self.cluster.route
        if route is None:
            return {}
        return {
            ("model", request_class): tuple(
                (name, float(share)) for name, share in zip(route.pools, route.pool_share[request_class], strict=True)
            )
            for request_class in REQUEST_CLASSES
        }

    # --- samples and the end -----------------------------------------------------------------------------------------

    def total_energy_j(self) -> dict[str, float]:
        """By kind, until now."""
        self.cluster.charge(self.now_s)
        rows = np.fromiter((i.row for i in self.cluster.instances.values()), np.int64, len(self.cluster.instances))
        prefill, decode, idle = self.cluster.engine_j + self._energy_of(rows).sum(axis=0)
        return {"prefill": float(prefill), "decode": float(decode), "idle": float(idle), **self.cluster.energy_j}

    def _sample(self) -> None:
        self._samples.take(
            self.now_s, sum(self.total_energy_j().values()), int(self.world.ledger.arrived.sum()), self.cluster
        )

    def _reject_waiting(self) -> None:
        """Nobody took these until the end."""
        routing, ledger, flights = self.world.routing, self.world.ledger, self.world.flights
        for k in range(len(REQUEST_CLASSES)):
            slot = int(routing.head[k])
            for _ in range(int(routing.depth[k])):
                ledger.rejected[flights.request_class[slot]] += 1
                slot = int(self.world.batch.next_slot[slot])
            routing.depth[k] = 0
        routing.waiting[0] = 0

    def busy_gpu_s(self) -> float:
        """GPU-seconds spent computing."""
        x = self.world.engines
        rows = [i.row for i in self.cluster.instances.values()]
        return self.cluster.busy_gpu_s + float((x.busy_s[rows] * x.tp[rows]).sum())

    def series(self) -> Series:
        """The samples."""
        return self._samples.series()


class Samples:
    """Collects the series of a run."""

    def __init__(self, tps: tuple[int, ...]) -> None:
        self._tps = tps
        self._rows: list[tuple[float, float, float, int, float, dict[int, int]]] = []
        self._before = (0.0, 0.0, 0)

    def take(self, now_s: float, energy_j: float, arrived: int, cluster: SimulatedCluster) -> None:
        """Add a sample; none if no time has gone by."""
        then_s, then_j, then_arrived = self._before
        gone_s = now_s - then_s
        if gone_s <= 0.0:
            return
        self._before = (now_s, energy_j, arrived)
        by_tp = dict.fromkeys(self._tps, 0)
        clocks = 0.0
        for instance in cluster.instances.values():
            if instance.state in (InstanceState.READY, InstanceState.DRAINING):
                by_tp[instance.tp] += instance.tp
                clocks += instance.tp * instance.sm_clock_mhz
        serving = sum(by_tp.values())
        power_w = (energy_j - then_j) / gone_s
        rate_rps = (arrived - then_arrived) / gone_s
        self._rows.append((now_s, power_w, rate_rps, cluster.gpus_on, clocks / max(serving, 1), by_tp))

    def series(self) -> Series:
        """All samples as columns."""
        rows = self._rows
        return Series(
            at_s=np.array([row[0] for row in rows]),
            power_w=np.array([row[1] for row in rows]),
            rate_rps=np.array([row[2] for row in rows]),
            gpus_on=np.array([row[3] for row in rows]),
            gpus_by_tp={tp: np.array([row[5][tp] for row in rows]) for tp in self._tps},
            clock_mhz=np.array([row[4] for row in rows]),
        )


def _no_arrivals() -> Arrivals:
    floats, ints = np.zeros(0), np.zeros(0, dtype=np.int64)
    return Arrivals(floats, ints, ints, floats, ints, ints, floats, floats)


def simulate(
    setup: SimulationSetup,
    workload: Workload,
    controller: Controller,
    policy: str,
    seed: int = 0,
    wall_clock: Callable[[], float] = lambda: 0.0,
    grid_g_per_kwh: Callable[[float], float] = lambda at_s: 0.0,
    gpu_usd_per_hour: float = 0.0,
) -> RunResult:
    """Run one workload under one controller to its end.

    ``grid_g_per_kwh`` gives the carbon intensity at a moment of the workload; ``wall_clock`` is read twice, for
    ``wall_s`` alone. Everything else follows from the arguments.
    """
    started_s = wall_clock()
    run = Simulation(setup, workload, controller, seed)
    run.run()
    energy_j = run.total_energy_j()
    series = run.series()
    spans_s = np.diff(series.at_s, prepend=0.0)
    co2_g = sum(
        power_w * span_s / 3.6e6 * grid_g_per_kwh(at_s - 0.5 * span_s)
        for at_s, span_s, power_w in zip(series.at_s, spans_s, series.power_w, strict=True)
    )
    changes = run.cluster.changes
    return RunResult(
        policy=policy,
        workload=workload.name,
        profile=setup.profile.name,
        gpus=setup.gpus,
        seed=seed,
        horizon_s=run.now_s,
        ledger=run.world.ledger,
        energy_by_kind_j=energy_j,
        gpu_s=run.cluster.gpu_s,
        busy_gpu_s=run.busy_gpu_s(),
        changes={
            "scale_out": changes.scale_out,
            "scale_in": changes.scale_in,
            "reshard": changes.reshard,
            "reassign": changes.reassign,
            "clock": changes.clock,
            "park": changes.park,
            "wake": changes.wake,
            "refused": changes.refused,
        },
        series=series,
        co2_g=float(co2_g),
        cost_usd=run.cluster.gpu_s / 3600.0 * gpu_usd_per_hour,
        wall_s=wall_clock() - started_s,
        notes=tuple(changes.reasons),
    )

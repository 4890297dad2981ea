"""PlanningController: the cluster, pool and instance controllers as one pure tick machine, set up by a Policy.

- joint mode: one plan for the whole cluster, often; costs of change set the time-scales. A plan is made anew early when
  what comes outgrows it.
- hierarchy (the paper's): every 30 min GPUs for each pool, by fragmentation of the predicted peak; every 5 min the TP
  mix
  within them; every 5 s clocks.
- static (baselines): GPUs are provided once, for a peak given beforehand; where clocks are all that may turn, the
  instances that are there may stand for that peak, and nothing is ever planned.

It never reads a clock nor acts: a driver calls ``on_tick`` and carries out the actions (see ``solver.control``).
Between plans it compares the cluster with the plan at every tick and orders what is missing, so lost instances come
back and what had to wait is done when it can be. Source: DynamoLLM section IV; the joint mode is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from energy.capacity import CapacityTable
from pools.instances import InstanceState
from pools.view import PoolView
from solver.candidates import CLASSES, Candidates, candidates
from solver.clocks import ClockChooser, ClockSettings
from solver.control import (
    STATE_CODE,
    Action,
    BoolArray,
    ClusterState,
    Demand,
    Diagnostic,
    Effects,
    FloatArray,
    Level,
    Observation,
    Plan,
    Reshard,
    Route,
    ScaleOut,
    SetFrequency,
    Tick,
)
from solver.diff import DiffSettings, diff
from solver.escalation import EscalationLadder, EscalationSettings
from solver.forecast import Forecast, Forecaster, SlotForecaster
from solver.fragmentation import fragment
from solver.planner import ChangeCosts, ClusterCosts, PlanLimits, Planned, Planner, Restriction
from solver.policies import Policy
from solver.recent_load import GAP_S

READY = STATE_CODE[InstanceState.READY]
STARTING = STATE_CODE[InstanceState.STARTING]
DRAINING = STATE_CODE[InstanceState.DRAINING]
_SECOND_CHECK_S = 0.5  # moments nearer than this are one


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """What a controller is told beside its policy."""

    changes: ChangeCosts = field(default_factory=ChangeCosts)
    cluster_costs: ClusterCosts = field(default_factory=ClusterCosts)
    limits: PlanLimits = field(default_factory=PlanLimits)
    clocks: ClockSettings = field(default_factory=ClockSettings)
    diff: DiffSettings = field(default_factory=DiffSettings)
    escalation: EscalationSettings = field(default_factory=EscalationSettings)
    lead_s: float = 420.0
    """How far beyond its period a plan looks: what starts now is READY by then (background start for a peak)."""
    history_s: float = 0.0
    """How long traffic must have been seen before the first plan; a cluster period without any will do as well.

    A forecast from a quiet start knows nothing of what comes, and a plan made of it drains what is needed next.
    """
    standby_s: float = 0.0
    """How far ahead parked instances must cover the peak; 0: nothing is parked for later."""
    replan_change: float = 0.02
    """A joint plan stays while the forecast has moved by less than this since it was made."""
    surge_memory_s: float = 15.0
    surge: float = 1.0
    """Demand beyond this share of a plan's reserve, seen over ``surge_memory_s``, makes a new plan at once."""
    least_gap_s: float = 15.0
    """Plans made for a surge are at least this far apart."""


class PlanningController:
    """A ``Controller`` for every policy."""

    def __init__(
        self,
        policy: Policy,
        tables: Mapping[str, CapacityTable],
        pools: Sequence[PoolView],
        settings: ControlSettings | None = None,
        forecaster: Forecaster | None = None,
        provision: Forecast | None = None,
        epoch: int = 1,
        stopwatch: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``tables`` by model; ``pools`` as in ``ClusterState.pools``, in that order.

        ``provision`` is the peak that static policies provide for; one that turns clocks alone needs none, and then
        takes the instances as they are. ``stopwatch`` gives seconds for the solve times in diagnostics, nothing else.
        Raises ``ValueError`` where policy, tables and pools do not fit.
        """
        if policy.static and provision is None and not policy.clocks_alone:
            raise ValueError(f"policy {policy.name} provides for a peak once: pass provision=Forecast(...)")
        self.policy = policy
        self.plan: Plan | None = None
        self._settings = settings or ControlSettings()
        self._pools = tuple(pools)
        self.candidates: Candidates = candidates(tables, pools, policy.knobs)
        self._planner = self._make_planner(self.candidates)
        self._lead_s = self._settings.lead_s
        self._forecaster = forecaster or SlotForecaster(CLASSES * len(tables))
        self._provision = provision
        self._tables = tables
        self._epoch = epoch
        self._stopwatch = stopwatch
        self._chooser = self._make_chooser(tables)
        self._ladder = EscalationLadder(self._settings.escalation)
        self._top_mhz = {model: table.sm_clocks_mhz[-1] for model, table in tables.items()}
        self._due: dict[Level, float] = {}
        self._version = 0
        self._serial = 0
        self._ordered: dict[str, ScaleOut] = {}
        self._settled = False
        self._routed: tuple[int, int] | None = None
        self._planned_for: Forecast | None = None
        self._planned_nodes: BoolArray = np.zeros(0, dtype=np.bool_)  # those that were usable then
        self._planned_at_s = float("-inf")
        self._recent_rps = np.zeros(CLASSES * len(tables))
        self._seen_s = 0.0  # of traffic, from the first request on
        self._began_s: float | None = None
        self._seen_until_s = 0.0
        self._restriction = Restriction()
        self._capacity = np.ones(len(self._pools))

    def _make_planner(self, choices: Candidates) -> Planner:
        settings = self._settings
        return Planner(choices, settings.changes, settings.cluster_costs, settings.limits)

    def _make_chooser(self, tables: Mapping[str, CapacityTable]) -> ClockChooser | None:
        """Who may not turn clocks still learns where instances carry less than their table says.

        Not where they carry more: without a higher clock nothing would catch the burst that shows it was too much.
        """
        settings = self._settings.clocks
        if self.policy.scale_clocks:
            return ClockChooser(tables, self._pools, settings)
        if self.policy.static:
            return None
        careful = replace(settings, factor_limits=(settings.factor_limits[0], 1.0))
        return ClockChooser(tables, self._pools, careful, self.policy.knobs.sm_clocks_mhz)

    def recall(self, at_s: float, demand: Demand) -> None:
        """Take in demand of the past, oldest first, that an earlier controller has seen; before the first tick."""
        self._forecaster.observe(at_s, demand)
        self._follow_recent(at_s, demand)

    def first_tick(self, now_s: float) -> Tick:
        """All levels at once, now."""
        planning = Level.JOINT if self.policy.joint else Level.CLUSTER | Level.POOL
        return Tick(now_s, Level.INSTANCE | planning)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Decide what is due; says why."""
        now_s = observation.now_s
        self._forecaster.observe(now_s, observation.demand)
        self._follow_recent(now_s, observation.demand)
        self._follow_starts(observation.start_s)
        notes: list[Diagnostic] = []
        levels = tick.levels
        if self._surges(observation):
            levels |= Level.JOINT
        if levels & ~Level.INSTANCE and not self._knows_enough(observation):
            levels &= Level.INSTANCE  # what is left out stays due
        if levels & ~Level.INSTANCE:
            notes += self._make_plan(levels, observation)
        actions = self._reconcile(now_s, observation.cluster)
        if levels & Level.INSTANCE:
            quick, quick_notes = self._instances(observation)
            actions += quick
            notes += quick_notes
        return Effects(tuple(actions), self._next_tick(now_s, levels), tuple(notes))

    # --- time --------------------------------------------------------------------------------------------------------

    def _next_tick(self, now_s: float, levels: Level) -> Tick:
        """The earliest of what is due next, with all that is due at the same time."""
        periods = self.policy.periods
        every = {Level.INSTANCE: periods.instance_s}
        if self.policy.joint:
            every[Level.JOINT] = periods.joint_s
        else:
            every |= {Level.POOL: periods.pool_s, Level.CLUSTER: periods.cluster_s}
        for level, period_s in every.items():
            if levels & level:
                self._due[level] = now_s + period_s
            elif self._due.get(level, now_s) <= now_s + _SECOND_CHECK_S:  # held back: looked at again
                self._due[level] = now_s + periods.instance_s
        at_s = min(self._due.values())
        due = Level(0)
        for level, when_s in self._due.items():
            if when_s <= at_s + _SECOND_CHECK_S:
                due |= level
        return Tick(at_s, due)

    def _knows_enough(self, observation: Observation) -> bool:
        """Whether the forecaster has seen enough for a first plan."""
        now_s, settings = observation.now_s, self._settings
        return (
            self.plan is not None
            or self._seen_s >= settings.history_s - _SECOND_CHECK_S
            or (self._began_s is not None and now_s - self._began_s >= self.policy.periods.cluster_s)
        )

    # --- planning ----------------------------------------------------------------------------------------------------

    def _follow_recent(self, now_s: float, demand: Demand) -> None:
        if self._began_s is None or now_s - demand.window_s > self._seen_until_s + GAP_S:
            self._began_s = now_s  # what came before a gap is no warm-up, and no rate of now
            self._seen_s, self._recent_rps = 0.0, np.zeros_like(self._recent_rps)
        self._seen_until_s = now_s
        if self._seen_s > 0.0 or demand.requests.any():
            self._seen_s += demand.window_s
        if demand.window_s > 0.0:
            keep = float(np.exp(-demand.window_s / self._settings.surge_memory_s))
            self._recent_rps = self._recent_rps * keep + (demand.requests / demand.window_s) * (1.0 - keep)

    def _follow_starts(self, start_s: float) -> None:
        """A start costs what starts were seen to take, not what was configured, and plans look that much ahead."""
        known_s = self._planner.changes.start_s
        if start_s > 0.0 and start_s != known_s:  # not nan
            self._planner.changes = self._planner.changes.with_start(start_s)
            self._lead_s = max(self._lead_s + start_s - known_s, 0.0)

    def _surges(self, observation: Observation) -> bool:
        """Whether what comes outgrows the plan, so that waiting for the next would cost SLOs."""
        if not self.policy.joint or self.policy.static or self._planned_for is None:
            return False
        if observation.now_s < self._planned_at_s + self._settings.least_gap_s - _SECOND_CHECK_S:
            return False
        work = self._work_of(self._recent_rps) - self._settings.surge * self._work_of(self._planned_for.reserve_rps)
        return bool(work > 0.0)

    def _work_of(self, rate_rps: FloatArray) -> float:
        """Demand in GPUs at the least GPUs per request: classes weigh what they need."""
        c = self.candidates
        per_request = c.work * (c.shape_tp[c.group_shape] / c.group_peak)
        least = per_request.min(axis=1)
        return float(rate_rps @ np.where(np.isfinite(least), least, 0.0))  # what nobody can serve asks for nothing

    def _make_plan(self, levels: Level, observation: Observation) -> list[Diagnostic]:
        if self.policy.static:
            return self._plan_static(levels, observation)
        periods = self.policy.periods
        if self.policy.joint:
            forecast = self._forecast(observation, periods.joint_s)
            if self._stays(forecast, observation.cluster, observation.now_s):
                return [_note("plan", "the forecast has hardly moved: the plan stays", self._rates(forecast))]
            return [self._solve(forecast, observation, periods.joint_s)]
        notes = []
        if levels & Level.CLUSTER:
            peak = self._forecast(observation, periods.cluster_s)
            parts = fragment(self.candidates, peak.reserve_rps)
            self._restriction = Restriction((np.zeros(len(self._pools)), parts.gpus), (parts.share > 0.0).astype(float))
            gpus = {pool.name: float(n) for pool, n in zip(self._pools, parts.gpus, strict=True)}
            notes.append(_note("cluster", "GPUs of each pool for the predicted peak", gpus))
        notes.append(self._solve(self._forecast(observation, periods.pool_s), observation, periods.pool_s))
        return notes

    def _plan_static(self, levels: Level, observation: Observation) -> list[Diagnostic]:
        """Provide once; afterwards only the TP mix may change within what each pool was given."""
        if self._provision is None:  # clocks alone, as was checked when it was made
            return [_note("plan", "the instances are given: clocks alone turn", {})]
        if self.plan is None:
            whole = replace(self.policy.knobs, tps=(int(self.candidates.shape_tp.max()),))
            usual, self._planner = self._planner, self._make_planner(candidates(self._tables, self._pools, whole))
            notes = [self._solve(self._provision, observation, float("inf"))]
            self._planner = usual
            if self.plan is not None:
                gpus = np.array([float(self.plan.gpus(pool.name)) for pool in self._pools])
                self._restriction = Restriction((gpus, gpus))
            return notes
        if not self.policy.scale_shards:
            return [_note("plan", "static: provided for the peak", {})]
        period_s = self.policy.periods.pool_s
        if observation.now_s < self._planned_at_s + period_s - _SECOND_CHECK_S:
            return []
        return [self._solve(self._forecast(observation, period_s), observation, period_s)]

    def _forecast(self, observation: Observation, period_s: float) -> Forecast:
        """What to plan for: the forecast, or what is already here if that is more."""
        forecast = self._forecaster.forecast(observation.now_s, period_s + self._lead_s)
        queued = observation.demand.queued / max(self._settings.surge_memory_s, 1.0)
        if self._work_of(self._recent_rps) > self._work_of(forecast.reserve_rps):
            surge = np.maximum(self._recent_rps, forecast.mean_rps)
            forecast = Forecast(surge, np.maximum(surge * 1.1, forecast.reserve_rps))
        return replace(forecast, reserve_rps=forecast.reserve_rps + queued)

    def _stays(self, forecast: Forecast, cluster: ClusterState, now_s: float) -> bool:
        """Whether the last plan is still good: little has changed since, and what was ordered is done."""
        before = self._planned_for
        if before is None or self.plan is None or not self._settled:
            return False
        if not np.array_equal(cluster.node_usable, self._planned_nodes):
            return False
        moved = (
            np.abs(forecast.mean_rps - before.mean_rps).sum() + np.abs(forecast.reserve_rps - before.reserve_rps).sum()
        )
        scale = before.mean_rps.sum() + before.reserve_rps.sum()
        recent = now_s < self._planned_at_s + 10.0 * self.policy.periods.joint_s
        return recent and bool(moved <= self._settings.replan_change * scale)

    def _solve(self, forecast: Forecast, observation: Observation, horizon_s: float) -> Diagnostic:
        standby = forecast.reserve_rps
        if self._settings.standby_s > 0.0:
            standby = self._forecaster.forecast(observation.now_s, self._settings.standby_s).reserve_rps
        problem = self._planner.problem(observation.cluster, forecast, standby, self._restriction, self._capacity)
        began_s = self._stopwatch()
        planned = self._planner.plan(problem)
        solve_s = self._stopwatch() - began_s
        numbers = {**self._rates(forecast), "solve_s": solve_s, **_numbers(planned)}
        if not planned.solution.found:
            return _note("plan", planned.why, numbers)
        self._version += 1
        self.plan = self._planner.as_plan(planned, self._epoch, self._version, observation.now_s, horizon_s)
        self._planned_for, self._planned_at_s = forecast, observation.now_s
        self._planned_nodes = observation.cluster.node_usable
        self._settled = False
        return _note("plan", planned.why, numbers)

    def _rates(self, forecast: Forecast) -> dict[str, float]:
        """Predicted against observed."""
        before = self._planned_for
        return {
            "forecast_rps": float(forecast.mean_rps.sum()),
            "reserve_rps": float(forecast.reserve_rps.sum()),
            "observed_rps": float(self._recent_rps.sum()),
            "previous_forecast_rps": float(before.mean_rps.sum()) if before else float("nan"),
        }

    # --- acting ------------------------------------------------------------------------------------------------------

    def _reconcile(self, now_s: float, cluster: ClusterState) -> list[Action]:
        """Order what the plan still lacks; nothing while cluster and plan agree."""
        if self.plan is None:
            return []
        self._ordered = {
            name: order
            for name, order in self._ordered.items()
            if name not in cluster.instances.ids and now_s <= order.deadline_s
        }
        if self._settled and self._agrees(cluster):
            return []
        actions = diff(self.plan, cluster, now_s, self._pools, self._settings.diff, self._ordered, self._serial)
        starts = [a for a in actions if isinstance(a, ScaleOut)]
        starts += [order for a in actions if isinstance(a, Reshard) for order in a.create]
        self._serial += len(starts)
        self._ordered |= {order.instance_id: order for order in starts}
        route_is_new = self._routed != self.plan.stamp
        self._routed = self.plan.stamp
        changes = [a for a in actions if not isinstance(a, Route)]
        states = cluster.instances.state
        self._settled = not changes and not self._ordered and not np.any(np.isin(states, (STARTING, DRAINING)))
        return [a for a in actions if route_is_new or not isinstance(a, Route)]

    def _agrees(self, cluster: ClusterState) -> bool:
        """Whether as many instances are there as planned: a crash shows here."""
        assert self.plan is not None
        planned = sum(group.count for group in self.plan.groups if not group.parked)
        return int(np.count_nonzero(np.isin(cluster.instances.state, (READY, STARTING)))) == planned

    def _instances(self, observation: Observation) -> tuple[list[Action], list[Diagnostic]]:
        """Clocks and escalation."""
        views, now_s = observation.cluster.instances, observation.now_s
        if not len(views):
            return [], []
        actions: list[Action] = []
        notes: list[Diagnostic] = []
        clock = views.sm_clock_mhz
        if self._chooser is not None:
            choice = self._chooser.choose(observation.demand.window_s, views, observation.demand.queued)
            # a pool that misses its SLO while instances are on their way is short of them: no reason to plan for less
            # from each. One that has all that was planned and misses it still carries less than its table says.
            short = bool(np.any(views.state == STARTING))
            self._capacity = np.maximum(choice.capacity_factor, 1.0) if short else choice.capacity_factor
            clock = choice.sm_clock_mhz
            for i in np.flatnonzero(clock != views.sm_clock_mhz):
                why = f"pool at {choice.pool_load[views.pool[i]]:.2f} of capacity, SLO missed {choice.missed[i]:.2f}"
                actions.append(
                    SetFrequency(
                        instance_id=views.ids[i],
                        sm_clock_mhz=int(clock[i]),
                        deadline_s=now_s + self._settings.diff.quick_deadline_s,
                        plan=self.plan.stamp if self.plan else (self._epoch, 0),
                        why=why,
                    )
                )
            load = choice.pool_load
            over = (load > 1.0) & np.isfinite(load)  # inf: what is remembered of a pool now empty
            full = {self._pools[p].name: float(load[p]) for p in np.flatnonzero(over)}
            if full:
                notes.append(_note("clock", "pools given more than they carry at the clocks chosen", full))
        top = np.array([self._top_mhz[pool.model] for pool in self._pools])[views.pool]
        escalations = self._ladder.climb(now_s, views, clock >= top)
        if escalations:
            notes.append(_note("escalation", f"{len(escalations)} instances miss their SLO at the highest clock", {}))
        return [*actions, *escalations], notes


def _numbers(planned: Planned) -> dict[str, float]:
    s = planned.solution
    return {
        "objective_w": s.objective_w,
        "power_w": s.power_w,
        "gap": s.gap,
        "branch_nodes": float(s.branch_nodes),
        "served": planned.served,
    }


def _note(topic: str, why: str, numbers: Mapping[str, float]) -> Diagnostic:
    return Diagnostic(topic, why, dict(numbers))

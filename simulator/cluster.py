"""SimulatedCluster: nodes, GPUs and instances in virtual time, and what the actions of controllers do to them.

An instance holds a row of the compiled loop from its start to its stop. Actions take effect after their delays; a
draining instance stops (is parked, is re-sharded) when its last request has gone. All that is not an engine step or a
loaded idle engine is charged here: booting, parked, re-sharding, and free GPUs of nodes that are on.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from energy.profile import EnergyProfile, GpuState
from pools.instances import InstanceState
from pools.scoring import LOAD_EMPTY, cost_row
from simulator.batching import EngineLimits
from simulator.delays import Delays
from simulator.operating import OperatingPoints
from simulator.world import World
from solver.control import (
    STATE_CODE,
    Action,
    Escalate,
    Park,
    Reassign,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Wake,
)

READY, STARTING, DRAINING, PARKED = (
    InstanceState.READY,
    InstanceState.STARTING,
    InstanceState.DRAINING,
    InstanceState.PARKED,
)


@dataclass(slots=True, eq=False)
class SimulatedInstance:
    """One instance and the row it holds."""

    id: str
    pool: int
    tp: int
    node: int
    row: int
    sm_clock_mhz: int
    state: InstanceState = STARTING
    ready_at_s: float = float("-inf")
    when_empty: Callable[[float], None] | None = None
    state_w: float = 0.0  # drawn in a state without engine steps, charged to ``state_kind``
    state_kind: str = "boot"


@dataclass(slots=True, eq=False)
class Changes:
    """What was done, and what could not be."""

    scale_out: int = 0
    scale_in: int = 0
    reshard: int = 0
    reassign: int = 0
    clock: int = 0
    park: int = 0
    wake: int = 0
    refused: int = 0  # no room until the deadline
    reasons: list[str] = field(default_factory=list)


class SimulatedCluster:
    """The cluster as the driver of virtual time sees and changes it."""

    def __init__(
        self,
        profile: EnergyProfile,
        nodes: int,
        gpus_per_node: int,
        pools: Sequence[str],
        world: World,
        points: OperatingPoints,
        limits: EngineLimits,
        delays: Delays,
        reclock: Callable[[Any, int, int, float], None],
        free_gpus_off: bool = True,
    ) -> None:
        self.profile = profile
        self.pools = tuple(pools)
        self.node_names = tuple(f"n{index}" for index in range(nodes))
        self.gpus_per_node = gpus_per_node
        self.world = world
        self.limits = limits
        self.delays = delays
        self.instances: dict[str, SimulatedInstance] = {}
        self.by_row: dict[int, SimulatedInstance] = {}
        self.changes = Changes()
        self.routes_changed = True
        self.clocks_changed = False  # the fastest of a pool may be another
        self.route: Route | None = None
        self.free = np.full(nodes, gpus_per_node, dtype=np.int64)
        rows = len(world.engines.mode)
        self.row_state = np.zeros(rows, dtype=np.int64)
        self.row_node = np.zeros(rows, dtype=np.int64)
        self.row_clock_mhz = np.zeros(rows, dtype=np.int64)
        self.row_blocks = np.zeros(rows, dtype=np.int64)
        self.row_ready_at_s = np.full(rows, float("-inf"))
        self.energy_j = {"boot": 0.0, "transition": 0.0, "parked": 0.0, "free": 0.0}
        self.engine_j = np.zeros(3)  # prefill, decode, idle of rows that are closed
        self.busy_gpu_s = 0.0
        self.gpu_s = 0.0  # GPUs of instances and of nodes that are on
        self._points = points
        self._reclock = reclock
        self._free_off = free_gpus_off
        self._node_on = np.zeros(nodes, dtype=np.bool_)
        self._free_rows = list(range(rows))[::-1]
        self._effects: list[tuple[float, int, Callable[[float], None]]] = []
        self._sequence = 0
        self._charged_s = 0.0
        self._state_w = dict.fromkeys(self.energy_j, 0.0)
        self._waiting_starts: list[tuple[ScaleOut, float]] = []

    # --- time ------------------------------------------------------------------------------------------------------

    @property
    def next_effect_s(self) -> float:
        """When something that was ordered takes effect; inf if nothing is under way."""
        return self._effects[0][0] if self._effects else float("inf")

    def run_effects(self, now_s: float) -> None:
        """Let everything due take effect, in order of time, then of order."""
        while self._effects and self._effects[0][0] <= now_s:
            at_s, _, effect = heapq.heappop(self._effects)
            effect(at_s)

    def _at(self, at_s: float, effect: Callable[[float], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._effects, (at_s, self._sequence, effect))

    def charge(self, now_s: float) -> None:
        """Charge everything that is not an engine row until now."""
        gone_s = now_s - self._charged_s
        if gone_s <= 0.0:
            return
        for kind, power_w in self._state_w.items():
            self.energy_j[kind] += power_w * gone_s
        on = self._node_on if self._free_off else np.ones_like(self._node_on)
        self.gpu_s += gone_s * (float(self.gpus_per_node * np.count_nonzero(on)))
        self._charged_s = now_s

    def _set_state_power(self, instance: SimulatedInstance, kind: str, power_w: float, now_s: float) -> None:
        self.charge(now_s)
        self._state_w[instance.state_kind] -= instance.state_w
        instance.state_kind, instance.state_w = kind, power_w
        self._state_w[kind] += power_w

    def _occupy(self, node: int, gpus: int, now_s: float) -> None:
        """Take GPUs of a node (or give them back, if negative): free ones of a node that is on stay powered."""
        self.charge(now_s)
        self.free[node] -= gpus
        self._node_on[node] = self.free[node] < self.gpus_per_node
        on = self._node_on if self._free_off else np.ones_like(self._node_on)
        bare_w = self.profile.idle_power_w(GpuState.BARE, self.profile.sm_clocks_mhz[0])
        self._state_w["free"] = bare_w * float(self.free[on].sum())

    @property
    def gpus_on(self) -> int:
        """GPUs of nodes that are on."""
        return int(self.gpus_per_node * np.count_nonzero(self._node_on))

    def kv_blocks(self, tp: int) -> int:
        """KV blocks of an instance of this TP."""
        return self.profile.kv_capacity_tokens(tp) // self.limits.block_tokens

    # --- actions ---------------------------------------------------------------------------------------------------

    def apply(self, action: Action, now_s: float, warm: bool = False) -> None:
        """Begin to carry an action out; ``warm`` skips all delays (the state before the experiment begins)."""
        if action.not_before_s > now_s and not warm:
            self._at(action.not_before_s, partial(self._apply_late, action))
            return
        if now_s > action.deadline_s:
            self._refuse(f"late: {action.why}")
            return
        if isinstance(action, SetFrequency):
            self._set_frequency(action, now_s, warm)
        elif isinstance(action, ScaleOut):
            self._scale_out(action, now_s, None if not warm else 0.0)
        elif isinstance(action, ScaleIn):
            self._scale_in(action.instance_id, now_s)
        elif isinstance(action, Reshard):
            self._reshard(action, now_s)
        elif isinstance(action, Park):
            self._park(action, now_s)
        elif isinstance(action, Wake):
            self._wake(action, now_s)
        elif isinstance(action, Reassign):
            self._reassign(action)
        elif isinstance(action, Route):
            self.route = action
            self.routes_changed = True
        elif isinstance(action, Escalate):
            pass  # queues are ordered by deadline and re-steered by the dispatch at all times

    def _apply_late(self, action: Action, now_s: float) -> None:
        self.apply(action, now_s)

    def _refuse(self, reason: str) -> None:
        self.changes.refused += 1
        if len(self.changes.reasons) < 20:
            self.changes.reasons.append(reason)

    def _set_frequency(self, action: SetFrequency, now_s: float, warm: bool) -> None:
        instance = self.instances.get(action.instance_id)
        if instance is None:
            self._refuse(f"clock of unknown instance {action.instance_id}")
            return
        if instance.sm_clock_mhz == action.sm_clock_mhz:
            return
        self.changes.clock += 1
        delay_s = 0.0 if warm else self.delays.clock_s
        self._at(now_s + delay_s, partial(self._clock_settled, action.instance_id, action.sm_clock_mhz))

    def _clock_settled(self, instance_id: str, sm_clock_mhz: int, now_s: float) -> None:
        instance = self.instances.get(instance_id)
        if instance is None:
            return
        instance.sm_clock_mhz = sm_clock_mhz
        self.row_clock_mhz[instance.row] = sm_clock_mhz
        if instance.state in (READY, DRAINING):
            self._set_operating(instance, now_s)
            self.clocks_changed = True

    def _set_operating(self, instance: SimulatedInstance, now_s: float) -> None:
        operating = self._points.index(instance.tp, instance.sm_clock_mhz)
        capacity = self.profile.kv_capacity_tokens(instance.tp)
        limits = self.limits
        row = cost_row(
            self._points.step(operating),
            instance.tp,
            float(operating),
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            capacity,
        )
        columns: Any
        for columns, value in zip(self.world.costs, row, strict=True):
            columns[instance.row] = value
        self._reclock(self.world.record, instance.row, operating, now_s)

    def _scale_out(self, action: ScaleOut, now_s: float, start_s: float | None) -> None:
        existing = self.instances.get(action.instance_id)
        if existing is not None:
            if existing.state is DRAINING:  # wanted again before it was gone
                self._open(existing, now_s)
            return
        node = self.node_names.index(action.node)
        if self.free[node] < action.tp or not self._free_rows:
            self._waiting_starts.append((action, now_s))
            return
        self.changes.scale_out += 1
        kind = "boot"
        if start_s is None:
            start_s = self.delays.start_s + (0.0 if self._node_on[node] else self.delays.node_on_s)
        self._create(action, node, now_s, start_s, kind)

    def _create(self, action: ScaleOut, node: int, now_s: float, start_s: float, kind: str) -> None:
        row = self._free_rows.pop()
        instance = SimulatedInstance(
            action.instance_id, self.pools.index(action.pool), action.tp, node, row, action.sm_clock_mhz
        )
        self.instances[instance.id] = instance
        self.by_row[row] = instance
        self._occupy(node, action.tp, now_s)
        instance.ready_at_s = now_s + start_s
        self._open_row(instance, now_s)
        top_mhz = self.profile.sm_clocks_mhz[-1]
        self._set_state_power(instance, kind, self.profile.idle_power_w(GpuState.LOADED, top_mhz) * instance.tp, now_s)
        self._set_state(instance, STARTING)
        self._at(instance.ready_at_s, partial(self._started, instance))

    def _started(self, instance: SimulatedInstance, now_s: float) -> None:
        if self.instances.get(instance.id) is instance and instance.state is STARTING:
            self._open(instance, now_s)

    def _open_row(self, instance: SimulatedInstance, now_s: float) -> None:
        x, row = self.world.engines, instance.row
        x.mode[row] = 0
        x.begin_s[row] = now_s
        x.tp[row] = instance.tp
        x.pool[row] = instance.pool
        x.draining[row] = 0
        x.energy_j[row] = 0.0
        x.busy_s[row] = 0.0
        x.class_arrivals[row] = 0
        x.worst_share[row] = -1.0
        x.late[row] = 0
        for column, value in zip(self.world.load, LOAD_EMPTY, strict=True):
            column[row] = value
        self.world.batch.free_blocks[row] = self.row_blocks[row] = self.kv_blocks(instance.tp)
        self.row_node[row] = instance.node
        self.row_clock_mhz[row] = instance.sm_clock_mhz
        x.operating[row] = self._points.index(instance.tp, instance.sm_clock_mhz)

    def _open(self, instance: SimulatedInstance, now_s: float) -> None:
        """It may be given requests from now on."""
        self._set_state_power(instance, instance.state_kind, 0.0, now_s)
        if instance.state is not DRAINING:
            self.world.engines.begin_s[instance.row] = now_s  # idles as an engine from now
        self.world.engines.draining[instance.row] = 0
        instance.when_empty = None
        self._set_state(instance, READY)
        self._set_operating(instance, now_s)

    def _set_state(self, instance: SimulatedInstance, state: InstanceState) -> None:
        instance.state = state
        self.row_state[instance.row] = STATE_CODE[state]
        self.row_ready_at_s[instance.row] = instance.ready_at_s if state is STARTING else float("-inf")
        self.routes_changed = True

    def _scale_in(self, instance_id: str, now_s: float) -> None:
        instance = self.instances.get(instance_id)
        if instance is None:
            return
        self.changes.scale_in += 1
        self._drain(instance, now_s, partial(self._stop, instance))

    def _drain(self, instance: SimulatedInstance, now_s: float, then: Callable[[float], None]) -> None:
        """Give it nothing new; when its last request has gone, go on with ``then``."""
        if instance.state in (STARTING, PARKED):
            then(now_s)
            return
        instance.when_empty = then
        self.world.engines.draining[instance.row] = 1
        self._set_state(instance, DRAINING)
        if self.world.load.in_flight[instance.row] <= 0.0 and self.world.engines.mode[instance.row] == 0:
            self.emptied(instance.row, now_s)

    def emptied(self, row: int, now_s: float) -> None:
        """The loop reports that a draining row has nothing left."""
        instance = self.by_row[row]
        if instance.when_empty is not None:
            then, instance.when_empty = instance.when_empty, None
            then(now_s)

    def _settle_engine(self, instance: SimulatedInstance, now_s: float) -> None:
        """The engine of a row ends: idle until now, then its energy goes to the closed rows' sum."""
        x, row = self.world.engines, instance.row
        if instance.state in (READY, DRAINING):
            self._reclock(self.world.record, row, int(x.operating[row]), now_s)  # charges idling until now
            self.engine_j += x.energy_j[row]
            self.busy_gpu_s += float(x.busy_s[row]) * instance.tp
            x.energy_j[row] = 0.0
            x.busy_s[row] = 0.0

    def _stop(self, instance: SimulatedInstance, now_s: float) -> None:
        self._settle_engine(instance, now_s)
        self._set_state_power(instance, instance.state_kind, 0.0, now_s)
        instance.state = InstanceState.STOPPED
        self.world.engines.draining[instance.row] = 0
        del self.instances[instance.id]
        del self.by_row[instance.row]
        self._free_rows.append(instance.row)
        self._occupy(instance.node, -instance.tp, now_s)
        self.routes_changed = True
        self._retry_starts(now_s)

    def _retry_starts(self, now_s: float) -> None:
        waiting, self._waiting_starts = self._waiting_starts, []
        for action, _ in waiting:
            if now_s > action.deadline_s:
                self._refuse(f"no room on {action.node} for {action.instance_id} until its deadline")
            else:
                self._scale_out(action, now_s, None)

    def _reshard(self, action: Reshard, now_s: float) -> None:
        self.changes.reshard += 1
        retiring = [self.instances[name] for name in action.retire if name in self.instances]
        left = len(retiring)

        def stopped(instance: SimulatedInstance, at_s: float) -> None:
            nonlocal left
            left -= 1
            self._stop(instance, at_s)
            if left == 0:
                create(at_s)

        def create(at_s: float) -> None:
            for order in action.create:
                if order.instance_id in self.instances:  # ordered twice
                    continue
                node = self.node_names.index(order.node)
                if self.free[node] < order.tp:
                    self._waiting_starts.append((order, at_s))
                else:
                    self._create(order, node, at_s, self.delays.reshard_s, "transition")

        if not retiring:
            create(now_s)
        for instance in retiring:
            self._drain(instance, now_s, partial(stopped, instance))

    def _reassign(self, action: Reassign) -> None:
        instance = self.instances.get(action.instance_id)
        if instance is None:
            self._refuse(f"pool of unknown instance {action.instance_id}")
            return
        instance.pool = self.pools.index(action.pool)
        self.world.engines.pool[instance.row] = instance.pool
        self.changes.reassign += 1
        self.routes_changed = True

    def _park(self, action: Park, now_s: float) -> None:
        instance = self.instances.get(action.instance_id)
        if instance is None or instance.state is PARKED:
            return
        self.changes.park += 1

        def park(at_s: float) -> None:
            self._settle_engine(instance, at_s)
            instance.sm_clock_mhz = action.sm_clock_mhz
            self.row_clock_mhz[instance.row] = action.sm_clock_mhz
            self.world.engines.draining[instance.row] = 0
            power_w = self.profile.idle_power_w(GpuState.PARKED, action.sm_clock_mhz) * instance.tp
            self._set_state_power(instance, "parked", power_w, at_s)
            self._set_state(instance, PARKED)

        self._drain(instance, now_s, park)

    def _wake(self, action: Wake, now_s: float) -> None:
        instance = self.instances.get(action.instance_id)
        if instance is None:
            self._refuse(f"wake of unknown instance {action.instance_id}")
            return
        instance.sm_clock_mhz = action.sm_clock_mhz
        self.row_clock_mhz[instance.row] = action.sm_clock_mhz
        if instance.state is DRAINING:
            self._open(instance, now_s)
        elif instance.state is PARKED:
            self.changes.wake += 1
            instance.ready_at_s = now_s + self.delays.wake_s
            power_w = self.profile.idle_power_w(GpuState.LOADED, action.sm_clock_mhz) * instance.tp
            self._set_state_power(instance, "transition", power_w, now_s)
            self._set_state(instance, STARTING)
            self._at(instance.ready_at_s, partial(self._started, instance))

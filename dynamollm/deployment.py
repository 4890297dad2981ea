"""Deployment: what runs now, kept by the runner and shown to the router. Pure: starts nothing, reads no clock.

It turns settings into instance specifications (which GPUs, which clock), takes in what drivers report, and gives the
router its immutable ClusterView and the gateway its directory of models and addresses.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dynamollm.placement import Placement
from dynamollm.settings import NodeSettings, PoolSettings, Settings
from energy.profile import EnergyProfile
from pools.classes import REQUEST_CLASSES, RequestClass
from pools.drivers.port import InstanceEvent, InstanceSpec
from pools.instances import Instance, InstanceShape, InstanceState
from pools.view import ClusterView, EngineLimits, InstanceView, PoolView
from proxy.services import Address, ServedModel

Shares = Mapping[tuple[str, RequestClass], tuple[tuple[str, float], ...]]

GONE = frozenset({InstanceState.STOPPED, InstanceState.FAILED})


def node_gpus(nodes: tuple[NodeSettings, ...]) -> dict[str, int]:
    """GPUs by the name of each machine."""
    return {name: node.gpus for node in nodes for name in node.names()}


class Deployment:
    """Instances by id, the GPUs they hold, and the views others take of them."""

    def __init__(
        self,
        settings: Settings,
        profiles: Mapping[str, EnergyProfile],
        lost_nodes: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """``profiles``: by model name; ``lost_nodes``: those whose GPUs cannot be had now, as the driver tells."""
        self.settings = settings
        self.profiles = profiles
        self.lost_nodes = lost_nodes
        self.placement = Placement(node_gpus(settings.nodes), lost_nodes)
        self.instances: dict[str, Instance] = {}
        self._pools = {pool.name: pool for pool in settings.pools}
        self._gpu_of_node = {name: node.gpu for node in settings.nodes for name in node.names()}
        self._models = {
            model.name: ServedModel(model.name, max_model_len=model.max_model_len) for model in settings.models
        }
        self._addresses: dict[str, Address] = {}
        self._counts: dict[str, int] = {}
        self._adopted: set[str] = set()  # names given by an earlier controller, never given again
        self._ready_at_s: dict[str, float] = {}
        self._begun: dict[str, int] = {}
        self._starts = 0
        self._ordered_mhz: dict[str, int] = {}
        self._views: dict[str, InstanceView] = {}
        self.shares: Shares = {}  # how the plan spreads each (model, class) over pools
        self._ordered: Counter[tuple[str, str]] = Counter()  # (instance, pool) to start, and how often it was asked for
        self._coming: frozenset[str] = frozenset()  # of another deployment, which this one follows
        self._version = 0

    # --- specifications --------------------------------------------------------------------------------------------

    def configured(self) -> list[InstanceSpec]:
        """Reserve GPUs for every instance the settings ask for, largest TP first; the specifications to start.

        Those that run already count, whatever their TP: a controller has had its reasons. Where one plans, what runs
        is what it wanted, and it says itself what is missing. Servers of a file are the driver's to find.
        """
        if self.settings.driver.urls_file is not None:
            return []
        running = Counter(instance.pool for instance in self.instances.values())
        if running and not self.settings.controller.keeps_instances:
            return []
        wanted = [pool for pool in self.settings.pools for _ in range(pool.instances - running[pool.name])]
        specs = [self.specify(pool.name) for pool in sorted(wanted, key=lambda pool: -pool.tp)]
        order = {pool.name: index for index, pool in enumerate(self.settings.pools)}
        return sorted(specs, key=lambda spec: order[spec.pool])

    def specify(
        self,
        pool_name: str,
        tp: int | None = None,
        sm_clock_mhz: int | None = None,
        node: str | None = None,
        instance_id: str | None = None,
    ) -> InstanceSpec:
        """Specify one more instance of a pool and reserve its GPUs. Raises ``NoRoomError`` where none are free."""
        pool: PoolSettings = self._pools[pool_name]
        clock_mhz = sm_clock_mhz or pool.sm_clock_mhz or self.profiles[pool.model].sm_clocks_mhz[-1]
        gpus = self.placement.take(tp or pool.tp, node)
        shape = InstanceShape(pool.model, self._gpu_of_node[gpus[0].node], len(gpus))
        return InstanceSpec(instance_id or self._new_name(pool_name), pool_name, shape, gpus, clock_mhz)

    def _new_name(self, pool_name: str) -> str:
        while True:
            self._counts[pool_name] = self._counts.get(pool_name, 0) + 1
            name = f"{pool_name.lower()}-{self._counts[pool_name]}"
            if name not in self._adopted:
                return name

    def reconfigure(self, settings: Settings, profiles: Mapping[str, EnergyProfile]) -> None:
        """Go on under another configuration of the same models, nodes and pools; views are priced anew."""
        self.settings = settings
        self.profiles = profiles
        self._views.clear()
        self._version += 1

    # --- what is reported ------------------------------------------------------------------------------------------

    def put(self, instance: Instance) -> None:
        """Take in an instance as its driver describes it."""
        self.instances[instance.id] = instance
        self._addresses[instance.id] = Address.of_url(instance.url)
        self._version += 1

    def adopt(self, instance: Instance) -> str:
        """Take in an instance that an earlier controller started; returns why it cannot be, or nothing."""
        if why := self._unfit(instance):
            return why
        self._adopted.add(instance.id)
        self.placement.hold(instance.gpus)
        self.put(instance)
        return ""

    def _unfit(self, instance: Instance) -> str:
        shape, pool = instance.shape, self._pools.get(instance.pool)
        if pool is None:
            return f"there is no pool {instance.pool!r} any more"
        if pool.model != shape.model:
            return f"pool {pool.name!r} is of model {pool.model!r} now, not {shape.model!r}"
        if shape.tp not in (holds := self.profiles[shape.model].tensor_parallel):
            return f"its profile holds for TP {', '.join(map(str, holds))} now, not {shape.tp}"
        if missing := {gpu.node for gpu in instance.gpus} - self.placement.nodes.keys():
            return f"there is no node {min(missing)!r} any more"
        if instance.gpus and shape.gpu != (gpu := self._gpu_of_node[instance.gpus[0].node]):
            return f"node {instance.gpus[0].node!r} has {gpu} now, not {shape.gpu}"
        return ""

    def follow(self, instances: Iterable[Instance], shares: Shares, coming: Iterable[str] = ()) -> None:
        """Be as somebody else's deployment is: its instances and shares stand for all that was here."""
        self._coming = frozenset(coming)
        self.instances = {instance.id: instance for instance in instances}
        self._addresses = {instance.id: Address.of_url(instance.url) for instance in self.instances.values()}
        self._views = {name: view for name, view in self._views.items() if name in self.instances}
        self.shares = dict(shares)
        self._version += 1

    def expect(self, starts: Iterable[tuple[str, str]]) -> bool:
        """Note that instances, each for a pool, are to be started, with or without room; whether ``coming`` changes."""
        before = self.coming
        self._ordered.update(starts)
        self._version += 1
        return self.coming != before

    def expect_no_more(self, starts: Iterable[tuple[str, str]]) -> bool:
        """They are there, or will not be, as far as they were expected once; whether ``coming`` changes."""
        before = self.coming
        self._ordered.subtract(starts)
        self._ordered = +self._ordered
        self._version += 1
        return self.coming != before

    @property
    def coming(self) -> frozenset[str]:
        """Pools for which an instance is ordered that is not there."""
        return self._coming.union(pool for name, pool in self._ordered if name not in self.instances)

    def begin_start(self, spec: InstanceSpec, ready_at_s: float) -> None:
        """Note that an instance is being started, and when it should be READY."""
        self._ready_at_s[spec.id] = ready_at_s
        self._ordered_mhz[spec.id] = spec.sm_clock_mhz
        self._starts += 1
        self._begun[spec.id] = self._starts

    def in_order(self) -> list[Instance]:
        """All instances, in the order in which their starts were asked for, however long each took."""
        return sorted(self.instances.values(), key=lambda instance: self._begun.get(instance.id, 0))

    def ready_at_s(self, instance_id: str) -> float:
        """When a STARTING instance should be READY; -inf for any other."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.state is not InstanceState.STARTING:
            return float("-inf")
        return self._ready_at_s.get(instance_id, float("-inf"))

    def change(self, event: InstanceEvent) -> Instance | None:
        """Take in a change of state; the instance as it is now, or None if it is not known.

        One that is gone frees its GPUs and is forgotten.
        """
        instance = self.instances.get(event.instance_id)
        if instance is None:
            return None
        instance = replace(instance, state=event.state)
        if event.state in GONE:
            del self.instances[instance.id]
            del self._addresses[instance.id]
            self._ready_at_s.pop(instance.id, None)
            self._begun.pop(instance.id, None)
            self._ordered_mhz.pop(instance.id, None)
            self._views.pop(instance.id, None)
            self.placement.release(instance.gpus)
        else:
            self.instances[instance.id] = instance
        self._version += 1
        return instance

    def set_sm_clock(self, instance_id: str, ordered_mhz: int, in_force_mhz: int) -> None:
        """Take in a clock: what was ordered, and the supported one that is in force; unknown instances are ignored."""
        if (instance := self.instances.get(instance_id)) is not None:
            self.instances[instance_id] = replace(instance, sm_clock_mhz=in_force_mhz)
            self._ordered_mhz[instance_id] = ordered_mhz
            self._version += 1

    def ordered_sm_clock_mhz(self, instance_id: str) -> int:
        """The clock last ordered for an instance: what a controller compares with, as GPUs round to their own steps."""
        return self._ordered_mhz.get(instance_id, self.instances[instance_id].sm_clock_mhz)

    def set_pool(self, instance_id: str, pool_name: str) -> None:
        """Let an instance serve in another pool from now on; unknown instances are ignored."""
        if (instance := self.instances.get(instance_id)) is not None:
            self.instances[instance_id] = replace(instance, pool=pool_name)
            self._version += 1

    def set_shares(self, pools: Sequence[str], pool_share: npt.NDArray[np.float64]) -> None:
        """Spread each (model, class) over pools as a plan says; ``pool_share[k, p]`` with k model-major, 9 classes."""
        shares = {}
        for model_index, model in enumerate(self._models):
            for request_class in REQUEST_CLASSES:
                row = pool_share[len(REQUEST_CLASSES) * model_index + request_class]
                spread = tuple((name, float(part)) for name, part in zip(pools, row, strict=True) if part > 0.0)
                if spread:
                    shares[model, request_class] = spread
        self.shares = shares
        self._version += 1

    @property
    def gpus(self) -> int:
        """GPUs of all nodes, held and free."""
        return sum(self.placement.nodes.values())

    # --- views -----------------------------------------------------------------------------------------------------

    def routing_view(self, now_s: float) -> ClusterView:
        """What the router may know, as of now."""
        return ClusterView(
            version=self._version,
            as_of_s=now_s,
            pools=tuple(PoolView(p.name, p.model, RequestClass[p.request_class]) for p in self.settings.pools),
            instances=tuple(self._instance_view(instance) for instance in self.instances.values()),
            shares=self.shares,
            coming=self.coming,
        )

    def _instance_view(self, instance: Instance) -> InstanceView:
        """The same object for as long as the instance is the same: the router then has nothing to work out anew."""
        known = self._views.get(instance.id)
        if known is None or known.instance != instance:
            known = self._views[instance.id] = self._new_view(instance)
        return known

    def _new_view(self, instance: Instance) -> InstanceView:
        profile = self.profiles[instance.shape.model]
        return InstanceView(
            instance,
            profile.step(instance.shape.tp, instance.sm_clock_mhz),
            EngineLimits(kv_capacity_tokens=profile.kv_capacity_tokens(instance.shape.tp)),
        )

    def models(self) -> Mapping[str, ServedModel]:
        """The models configured, by name."""
        return self._models

    def servable(self, model: str) -> bool:
        """Whether at least one instance of the model takes requests."""
        return any(i.state is InstanceState.READY and i.shape.model == model for i in self.instances.values())

    def address(self, instance_id: str) -> Address | None:
        """Where an instance listens; None when it is gone."""
        return self._addresses.get(instance_id)

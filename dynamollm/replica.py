"""Replica: one gateway among several. It follows the published cluster, tells what it counts, and hears the others.

All of it beside the requests' path, which only ever reads what was last heard: while the store is away the gateway
serves on with the cluster it knows, keeps what the ledger is owed, and forgets what it heard of the others' load once
that is too old to be true.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.ledger_feed import LedgerFeed
from dynamollm.reports import (
    CLUSTER,
    CONTROLLERS,
    GATEWAYS,
    LEDGER,
    ControllerReport,
    GatewayReport,
    PublishedCluster,
    Totals,
    document,
    read,
    shares_of,
)
from dynamollm.settings import Settings
from dynamollm.store import NEVER, Stamp, Store
from dynamollm.tenants import TenantLimit
from energy.profile import EnergyProfile
from pools.peers import together
from pools.router import Router

log = logging.getLogger("dynamollm.replica")

FOLLOW_S = 0.5  # how often to look for a newer cluster, nudged or not
TELL_S = 0.25
REPORT_TTL_S = 3.0
SHARE_S = 5.0  # how long a use of an SLO is told
LEDGER_BATCHES = 50_000  # of the stream, each of one gateway's quarter of a second


class Replica:
    """``run`` it as a task."""

    def __init__(
        self,
        name: str,
        store: Store,
        deployment: Deployment,
        router: Router,
        feed: LedgerFeed,
        limit: TenantLimit | None,
        profiles_of: Callable[[Settings], Mapping[str, EnergyProfile]],
        clock: Callable[[], float],
        unix_offset_s: float,
    ) -> None:
        """``profiles_of``: of the models under these settings; raises ``UserError``."""
        self.name = name
        self.follows: Stamp = NEVER
        self.controller_url = ""  # of the leader; empty while none is known
        self.store_away = False
        self.peers = 0  # other gateways heard
        self._store = store
        self._deployment = deployment
        self._router = router
        self._feed = feed
        self._limit = limit
        self._profiles_of = profiles_of
        self._clock = clock
        self._offset_s = unix_offset_s
        self._heard_s = clock()
        self._shares: tuple[dict[str, float], dict[str, float]] = ({}, {})  # of this stretch of time, and the last
        self._shares_turn_s = 0.0
        self._late: Counter[str] = Counter()  # ever, by instance
        self._missing: dict[str, str] = {}  # profiles that cannot be had here, once that was said
        self._following = asyncio.Event()

    async def run(self) -> None:
        """Follow and tell until cancelled; what the ledger is owed is sent at the end, if it can be."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._every(FOLLOW_S, self.follow, nudged=True))
                tasks.create_task(self._every(TELL_S, self.tell))
        finally:
            await self._guarded(self._send)

    async def following(self) -> None:
        """Wait until there is a cluster to route to."""
        await self._following.wait()

    async def _every(self, period_s: float, step: Callable[[], Awaitable[None]], nudged: bool = False) -> None:
        while True:
            await self._guarded(step)
            if nudged:
                await self._store.nudged(period_s)
            else:
                await asyncio.sleep(period_s)

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        """A step; that the store is away is said once, and so is that it is back."""
        try:
            await step()
        except (OSError, ValueError) as error:
            if not self.store_away:
                log.warning("%s serves on with what it knows: %s", self.name, error)
            self.store_away = True
        else:
            if self.store_away:
                log.warning("%s reaches the store again", self.name)
            self.store_away = False

    # --- following ---------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Take over a newer cluster, if there is one; an older one is never asked for."""
        found = await self._store.published(CLUSTER, self.follows)
        if found is None:
            return
        stamp, plain = found
        cluster = read(plain, PublishedCluster)
        now_s = self._clock()
        self._follow_profiles(cluster.profiles)
        self._deployment.follow(cluster.instances, shares_of(cluster.shares), cluster.coming)
        self._router.update(self._deployment.routing_view(now_s), now_s)
        self.follows = stamp
        self._following.set()

    def _follow_profiles(self, named: Mapping[str, str]) -> None:
        """Price instances by the profiles that the leader plans with; by those of before where there are none here."""
        settings = self._deployment.settings
        models = tuple(replace(model, profile=named.get(model.name, model.profile)) for model in settings.models)
        if models == settings.models:
            return
        after = replace(settings, models=models)
        try:
            profiles = self._profiles_of(after)
        except UserError as error:
            if named != self._missing:
                log.warning("%s goes on with the profiles it has: %s", self.name, error)
            self._missing = dict(named)
        else:
            self._deployment.reconfigure(after, profiles)

    # --- telling and hearing -----------------------------------------------------------------------------------------

    async def tell(self) -> None:
        """Report, hear the others, and send what the ledger is owed."""
        now_s = self._clock()
        self._feed.cut(now_s)
        try:
            await self._store.report(GATEWAYS, self.name, document(self.report(now_s)), REPORT_TTL_S)
            plain = await self._store.reports(GATEWAYS)
            controllers = await self._store.reports(CONTROLLERS)
            await self._send()
        except OSError:
            self._feed.send_again()
            if now_s > self._heard_s + REPORT_TTL_S:
                self._hear({})  # too old to be true; what engines say of their load still counts
            raise
        self._heard_s = now_s
        self._hear({name: read(each, GatewayReport) for name, each in plain.items() if name != self.name})
        self._take_lead([read(each, ControllerReport) for each in controllers.values()])

    def report(self, now_s: float) -> GatewayReport:
        """What this gateway tells, as of now."""
        queued = self._router.queue.depths()
        if now_s >= self._shares_turn_s:
            self._shares = ({}, self._shares[0])
            self._shares_turn_s = now_s + SHARE_S
            here = self._deployment.instances
            self._late = Counter({i: late for i, late in self._late.items() if i in here})
        now, before = self._shares
        return GatewayReport(
            at_unix_s=now_s + self._offset_s,
            follows=self.follows,
            totals=tuple(
                Totals(model, c, t.arrived, t.input_tokens, t.finished, t.output_tokens, queued.get((model, c), 0))
                for (model, c), t in self._router.traffic.snapshot().items()
                if t.arrived
            ),
            loads=self._router.fleet.own(),
            given={name: counts.given for name, counts in self._router.counts().items() if any(counts.given)},
            late=dict(self._late),
            shares={name: max(now.get(name, 0.0), before.get(name, 0.0)) for name in {**before, **now}},
            tenants=dict(self._limit.own) if self._limit else {},
            minute=self._limit.minute if self._limit else 0,
            ledger_batches=self._feed.batches,
        )

    def on_share(self, instance_id: str, share: float, late: int) -> None:
        """Take in what share of its SLO was used on an instance, and how many more requests are late there."""
        now = self._shares[0]
        now[instance_id] = max(share, now.get(instance_id, 0.0))
        if late:
            self._late[instance_id] += late

    def _hear(self, others: dict[str, GatewayReport]) -> None:
        now_s = self._clock()
        self.peers = len(others)
        self._router.hear(together(report.loads for report in others.values()), now_s, len(others))
        if self._limit is not None:
            self._limit.hear(((report.minute, report.tenants) for report in others.values()), now_s)

    def _take_lead(self, controllers: list[ControllerReport]) -> None:
        leader = max(controllers, key=lambda report: report.epoch, default=None)
        if leader is None or not leader.epoch:
            return
        self.controller_url = leader.url
        self._feed.booked(leader.booked.get(self.name, 0), self._clock())

    async def _send(self) -> None:
        batches = self._feed.to_send(self._clock())
        if batches:
            await self._store.append(LEDGER, self._feed.documents(self.name, batches), LEDGER_BATCHES)
            self._feed.sent(batches)

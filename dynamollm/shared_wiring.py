"""The wiring of a deployment in several processes: gateways, and controllers of which one commands.

As ``dynamollm.wiring``, which puts all of it into one process, this names concrete classes; nothing else does.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import getpid

from prometheus_client import ProcessCollector

from dynamollm.accounts import AccountedRouter, GatewayAccounts
from dynamollm.adapters.clock import monotonic_s, unix_offset_s
from dynamollm.adapters.engine_probe import HttpEngineProbe
from dynamollm.collected import Collected
from dynamollm.commander import Commander
from dynamollm.control_loop import FIRST_LOOK_S, AsyncController, ControlLoop, StaticController
from dynamollm.controller_recipe import controller_recipe
from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.kubernetes_wiring import build_leadership
from dynamollm.leadership import Candidate
from dynamollm.learning import GatewayLengths
from dynamollm.ledger_feed import LedgerFeed, LedgerTail
from dynamollm.load_history import LoadHistory
from dynamollm.metering import HeldGpus, Metering
from dynamollm.observation import CLASSES, Observer
from dynamollm.operations import Operations
from dynamollm.persistence import Persistence
from dynamollm.publishing import PublishedFleet
from dynamollm.reload import as_it_is_now
from dynamollm.replica import Replica
from dynamollm.runner import Runner, Scraper
from dynamollm.settings import Settings
from dynamollm.sharing_metrics import ReplicaMetrics
from dynamollm.slo_watch import SloWatch
from dynamollm.store import Store
from dynamollm.tenants import LimitedRouter, TenantLimit
from dynamollm.term import ControllerTerm
from dynamollm.wiring import (
    Learners,
    build_driver,
    build_ledger,
    build_meter,
    build_reload,
    build_services,
    build_store,
    length_limits,
    load_profiles,
    past_load,
    router_limits,
)
from pools.learned_lengths import LearnedLengths
from pools.router import Router
from pools.tokens import TokenEstimator
from proxy.metrics import GatewayMetrics
from proxy.services import GatewayServices
from solver.adapters.controller_process import ControllerProcess
from solver.control import Observation

EPOCHS_OF_A_TERM = 1000  # a controller process that is lost within a term is followed by one of a higher epoch

RECALLED_LOOK_S = 0.5  # before the first tick of one that knows what came until now


def process_name(role: str) -> str:
    """Of this process, unlike any other's."""
    return f"{role}-{socket.gethostname()}-{getpid()}"


@dataclass(frozen=True, slots=True)
class SharedGateway:
    """Everything one gateway process of several runs."""

    settings: Settings
    store: Store
    deployment: Deployment
    services: GatewayServices
    replica: Replica
    scraper: Scraper
    probe: HttpEngineProbe
    persistence: Persistence


def build_gateway(settings: Settings, name: str, clock: Callable[[], float] = monotonic_s) -> SharedGateway:
    """Put a gateway together; starts nothing. Raises ``UserError`` for a profile or a file it cannot use."""
    store = build_store(settings.store)
    deployment = Deployment(settings, load_profiles(settings))
    router = Router(router_limits(settings.limits))
    probe = HttpEngineProbe()
    offset_s = unix_offset_s()
    feed = LedgerFeed(offset_s)
    most = settings.limits.tenant_requests_per_minute
    limit = TenantLimit(most, offset_s) if most is not None else None
    replica = Replica(name, store, deployment, router, feed, limit, load_profiles, clock, offset_s)
    watch = SloWatch(router, replica.on_share)
    accounted = AccountedRouter(router, feed, watch.on_first_token)
    estimator, predictor = TokenEstimator(settings.slo.cuts), LearnedLengths(length_limits(settings))
    metrics = GatewayMetrics()
    metrics.registry.register(ReplicaMetrics(replica, feed))
    metrics.registry.register(ProcessCollector(registry=None))
    return SharedGateway(
        settings=settings,
        store=store,
        deployment=deployment,
        services=build_services(
            settings,
            deployment,
            LimitedRouter(accounted, limit) if limit else accounted,
            Learners(estimator, GatewayLengths(predictor)),
            metrics,
            clock,
            observers=(GatewayAccounts(feed).book, watch.on_outcome),
            energy_j=None,  # who meters is elsewhere
        ),
        replica=replica,
        scraper=Scraper(deployment, router, probe, clock),
        probe=probe,
        persistence=Persistence(store, {"tokens": estimator, "lengths": predictor}),
    )


def build_commander(
    settings: Settings,
    name: str,
    clock: Callable[[], float] = monotonic_s,
    read: Callable[[], Settings] | None = None,
) -> Commander[ControllerTerm]:
    """Put a controller together; starts nothing. Raises ``UserError`` for a profile or a file it cannot use.

    ``read``: the configuration as it is now, for every term to begin with and to reload; ``settings`` stand without.
    """
    if settings.energy.carbon_zone is not None:
        raise UserError("energy.carbon_zone: asked by a deployment of one process alone; use carbon_file")
    store = build_store(settings.store)
    candidate = Candidate(build_leadership(settings, store, clock), name, settings.controller.lease_s, clock)
    collected, history, offset_s = Collected(), LoadHistory(), unix_offset_s()
    profiles = load_profiles(settings)
    watcher = Observer(Deployment(settings, profiles), collected, clock())

    read_now = read or (lambda: settings)
    in_force, process = settings, build_process(settings)

    async def begin(epoch: int) -> ControllerTerm:
        nonlocal in_force, process
        in_force = as_it_is_now(in_force, read_now, lambda now: (load_profiles(now), build_process(now)))
        if isinstance(process, StaticController) != (in_force.controller.policy == "static"):
            await process.close()
            process = build_process(in_force)
        return build_term(in_force, read_now, epoch, store, candidate, collected, history, process, clock, offset_s)

    async def warm() -> None:
        if isinstance(process, ControllerProcess):
            await process.warm()

    return Commander(
        store,
        candidate,
        collected,
        history,
        CLASSES * len(settings.models),
        watcher.observe,
        begin,
        warm,
        clock,
        offset_s,
    )


def build_process(settings: Settings) -> AsyncController:
    """Who decides. Raises ``UserError`` where a profile has no capacity table."""
    if settings.controller.policy == "static":
        return StaticController()
    return ControllerProcess(controller_recipe(settings))


def build_term(
    settings: Settings,
    read: Callable[[], Settings],
    epoch: int,
    store: Store,
    candidate: Candidate,
    collected: Collected,
    history: LoadHistory,
    controller: AsyncController,
    clock: Callable[[], float],
    offset_s: float,
) -> ControllerTerm:
    """What commands the cluster in one epoch."""
    driver = build_driver(settings)
    deployment = Deployment(settings, load_profiles(settings), driver.lost_nodes)
    published = PublishedFleet(
        candidate.holder, epoch, store, deployment, collected, lambda: clock() + offset_s, candidate.saw
    )
    runner = Runner(deployment, driver, published, None, clock, startup_s=settings.driver.startup_s)
    operations = Operations(deployment, driver, runner, clock)
    ledger = build_ledger(settings.energy)
    tail = LedgerTail(ledger, offset_s)

    def heard_s(now_s: float) -> float:
        batches = {name: (r.ledger_batches, r.at_unix_s) for name, r in collected.reports.items()}
        return tail.heard_s(batches, now_s, collected.heard)

    meter = build_meter(driver)
    metering = Metering(meter, ledger, HeldGpus(deployment), clock, heard_s) if meter else None
    power_w = metering.power_w if metering else dict
    observer = Observer(deployment, collected, clock(), power_w, lambda: runner.seen_start_s)
    collected.on_share = observer.on_share

    def observe(now_s: float) -> Observation:
        observation = observer.observe(now_s)
        history.add(now_s + offset_s, observation.demand)
        return observation

    past = past_load(history, offset_s)
    if isinstance(controller, ControllerProcess):
        controller.begin(replace(controller_recipe(settings), past=past), EPOCHS_OF_A_TERM * epoch)
    term: ControllerTerm
    control = ControlLoop(
        controller,
        observe,
        lambda actions: term.order(actions),
        clock,
        RECALLED_LOOK_S if past else FIRST_LOOK_S,
        lambda: candidate.leads,
    )
    term = ControllerTerm(
        epoch=epoch,
        settings=settings,
        store=store,
        deployment=deployment,
        runner=runner,
        operations=operations,
        control=control,
        router=collected,
        published=published,
        ledger=ledger,
        tail=tail,
        metering=metering,
        clock=clock,
        unix_offset_s=offset_s,
        reload=build_reload(
            read, runner, deployment, operations, control, history, offset_s, EPOCHS_OF_A_TERM * epoch + 1
        ),
    )
    return term

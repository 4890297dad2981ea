"""Wiring: settings in, a gateway with its cluster out. The only file that names concrete classes and adapters."""

import secrets
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import httpx
from prometheus_client import ProcessCollector

from dynamollm.accounts import AccountedRouter, GatewayAccounts, nobody
from dynamollm.adapters.clock import monotonic_s, unix_offset_s
from dynamollm.adapters.engine_probe import HttpEngineProbe
from dynamollm.adapters.redis_store import RedisStore
from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.attach_wiring import build_attach_driver
from dynamollm.cluster_metrics import ControlMetrics, FleetMetrics, SavingsMetrics
from dynamollm.control_loop import AsyncController, ControlLoop, StaticController
from dynamollm.controller_recipe import controller_recipe
from dynamollm.counterfactual import AsyncShadows, Counterfactual
from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.kept_load import KeptLoad
from dynamollm.kubernetes_wiring import build_kubernetes_driver, desired_replicas
from dynamollm.learning import GatewayLengths, GatewayTokens
from dynamollm.load_history import LoadHistory
from dynamollm.metering import DriverMeter, GpuMeter, HeldGpus, Metering
from dynamollm.observation import CLASSES, Observer
from dynamollm.operations import Operations
from dynamollm.persistence import Persistence
from dynamollm.ray_wiring import build_ray_driver
from dynamollm.reload import Reload
from dynamollm.runner import Runner
from dynamollm.settings import EnergySettings, LimitSettings, Settings, StoreSettings
from dynamollm.shadow_wiring import build_shadows
from dynamollm.slo_watch import SloWatch
from dynamollm.store import Store
from dynamollm.vllm_wiring import build_emulated_device_driver, build_vllm_driver
from energy.accounting import GPU_HOUR_USD, Prices
from energy.accounting_ledger import EnergyLedger
from energy.accounting_metrics import LedgerMetrics
from energy.adapters.agent_meter import AgentMeter
from energy.adapters.capacity_file import load_capacity
from energy.adapters.carbon_electricity_maps import ElectricityMapsIntensity
from energy.adapters.carbon_file import read_hourly
from energy.adapters.catalogue import load_profile
from energy.carbon import CarbonError, CarbonIntensity, StaticIntensity, intensity_of_region
from energy.profile import EnergyProfile, ProfileError
from pools.adapters.tokenizer_files import load_tokenizer
from pools.classes import ClassSlos
from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from pools.drivers.port import InstanceDriver, MeteredDriver
from pools.escalation import EscalationLimits
from pools.learned_lengths import LearnedLengths, LengthLimits
from pools.length_costs import LengthCosts
from pools.queue import QueueLimits
from pools.router import Router, RouterLimits
from pools.tokens import ExactTokens, InputCounter, TokenEstimator
from proxy.metrics import GatewayMetrics
from proxy.outcome import Outcome
from proxy.services import Directory, GatewayServices
from proxy.services import Router as RoutingRouter
from proxy.settings import Deadlines, Limits, ProxySettings
from solver.adapters.controller_process import ControllerProcess
from solver.control import Demand, Observation

DEFAULT_REGION = "us-west2"  # California, the grid of the paper's carbon figures


@dataclass(frozen=True, slots=True)
class Application:
    """Everything one `dynamollm serve` process runs."""

    settings: Settings
    deployment: Deployment
    runner: Runner
    services: GatewayServices
    probe: HttpEngineProbe
    operations: Operations
    controller: AsyncController  # that ``control`` begins with
    control: ControlLoop
    router: Router
    ledger: EnergyLedger
    metering: Metering | None  # None: nobody tells what the GPUs draw
    persistence: Persistence
    counterfactual: Counterfactual | None  # None: nothing to compare with
    clock: Callable[[], float]
    history: LoadHistory
    kept_load: KeptLoad | None  # None: the store outlives nothing
    unix_offset_s: float
    carbon: ElectricityMapsIntensity | None  # what has to be asked now and then


def build(
    settings: Settings,
    clock: Callable[[], float] = monotonic_s,
    driver: InstanceDriver | None = None,
    controller: AsyncController | None = None,
    shadows: AsyncShadows | None = None,
) -> Application:
    """Put the application together; starts nothing. Raises ``UserError`` for a profile or a file it cannot use.

    ``driver``, ``controller`` and ``shadows`` stand in for those that the settings ask for.
    """
    driver = driver or build_driver(settings)
    deployment = Deployment(settings, load_profiles(settings), driver.lost_nodes)
    router = Router(router_limits(settings.limits))
    probe = HttpEngineProbe()
    meter = build_meter(driver)
    runner = Runner(deployment, driver, router, probe, clock, startup_s=settings.driver.startup_s)
    operations = Operations(deployment, driver, runner, clock)
    carbon = build_carbon(settings.energy)
    ledger = build_ledger(settings.energy, carbon)
    accounts = GatewayAccounts(ledger)
    metering = Metering(meter, ledger, HeldGpus(deployment), clock) if meter else None
    counterfactual = build_counterfactual(settings, metering, clock, shadows)
    power_w = metering.power_w if metering else dict
    observer = Observer(deployment, router, clock(), power_w, lambda: runner.seen_start_s)
    watch = SloWatch(router, observer.on_share)
    controller = controller or build_controller(settings)
    estimator = TokenEstimator(settings.slo.cuts)
    predictor = LearnedLengths(length_limits(settings))
    lengths = GatewayLengths(predictor)
    store = build_store(settings.store)
    persistence = Persistence(store, {"tokens": estimator, "lengths": predictor, "ledger": ledger})
    metrics = GatewayMetrics()
    history, offset_s = LoadHistory(), unix_offset_s()
    demands = CLASSES * len(settings.models)
    kept_load = KeptLoad(store, history, demands) if settings.store.kind != "memory" else None

    def observe(now_s: float) -> Observation:
        observation = observer.observe(now_s)
        history.add(now_s + offset_s, observation.demand)
        if kept_load is None:
            history.forget_unwritten()
        return observation

    control = ControlLoop(controller, observe, operations.apply, clock)
    for collector in (
        LedgerMetrics(ledger),
        FleetMetrics(deployment, router.in_flight),
        ControlMetrics(control, operations),
        ProcessCollector(registry=None),
        SavingsMetrics(counterfactual),
        *desired_replicas(settings, driver),
    ):
        metrics.registry.register(collector)
    arrived = counterfactual.on_arrival if counterfactual else nobody
    observers = [accounts.book, watch.on_outcome, *([counterfactual.on_outcome] if counterfactual else [])]
    return Application(
        settings=settings,
        deployment=deployment,
        runner=runner,
        services=build_services(
            settings,
            deployment,
            AccountedRouter(router, ledger, watch.on_first_token, arrived),
            Learners(estimator, lengths),
            metrics,
            clock,
            observers=tuple(observers),
            energy_j=accounts.energy_j if metering else None,
        ),
        probe=probe,
        operations=operations,
        controller=controller,
        control=control,
        router=router,
        ledger=ledger,
        metering=metering,
        persistence=persistence,
        counterfactual=counterfactual,
        clock=clock,
        history=history,
        kept_load=kept_load,
        unix_offset_s=offset_s,
        carbon=carbon if isinstance(carbon, ElectricityMapsIntensity) else None,
    )


class Learners(NamedTuple):
    """What learns from requests that end."""

    tokens: TokenEstimator
    lengths: GatewayLengths


def build_services(
    settings: Settings,
    directory: Directory,
    router: RoutingRouter,
    learners: Learners,
    metrics: GatewayMetrics,
    clock: Callable[[], float],
    observers: tuple[Callable[[Outcome], None], ...],
    energy_j: Callable[[Outcome], float | None] | None,
) -> GatewayServices:
    """What a gateway is made of."""
    return GatewayServices(
        router=router,
        directory=directory,
        tokens=InputCounter(learners.tokens, load_tokenizers(settings)),
        lengths=learners.lengths,
        metrics=metrics,
        clock=clock,
        settings=proxy_settings(settings),
        observers=observers,
        learners=(learners.lengths.learn, GatewayTokens(learners.tokens).learn),
        energy_j=energy_j,
    )


def build_counterfactual(
    settings: Settings, metering: Metering | None, clock: Callable[[], float], shadows: AsyncShadows | None = None
) -> Counterfactual | None:
    """What is compared with, where something is metered, wanted, and can be simulated."""
    if metering is None or not settings.energy.counterfactual:
        return None
    shadows = shadows or build_shadows(settings)
    return Counterfactual(shadows, lambda: metering.drawn_j, clock) if shadows else None


def build_store(store: StoreSettings) -> Store:
    """Where things are kept and shared."""
    match store.kind:
        case "redis":
            return RedisStore(store.url, store.prefix)
        case "file":
            return SqliteStore(Path(store.folder).expanduser())
        case _:
            return SqliteStore()


def build_ledger(energy: EnergySettings, carbon: CarbonIntensity | None = None) -> EnergyLedger:
    """The books. Raises ``UserError`` for a region or a file it does not know."""
    prices = Prices({**GPU_HOUR_USD, **energy.gpu_hour_usd}, energy.electricity_usd_per_kwh)
    return EnergyLedger(carbon or build_carbon(energy), prices, unix_offset_s())


def build_carbon(energy: EnergySettings) -> CarbonIntensity:
    """The grid's carbon intensity. Raises ``UserError`` for a region or a file it does not know."""
    if energy.carbon_zone is not None and energy.carbon_token is not None:
        client = httpx.AsyncClient(timeout=10.0)
        return ElectricityMapsIntensity(
            client, energy.carbon_zone, energy.carbon_token, intensity_of_region(DEFAULT_REGION)
        )
    if energy.carbon_g_per_kwh is not None:
        return StaticIntensity(energy.carbon_g_per_kwh, "energy.carbon_g_per_kwh of the configuration")
    try:
        if energy.carbon_file is not None:
            return read_hourly(Path(energy.carbon_file))
    except (CarbonError, OSError) as error:
        raise UserError(f"energy.carbon_file: {error}") from None
    try:
        return intensity_of_region(energy.carbon_region or DEFAULT_REGION)
    except CarbonError as error:
        raise UserError(f"energy.carbon_region: {error}") from None


def build_controller(
    settings: Settings, first_epoch: int = 1, past: tuple[tuple[float, Demand], ...] = ()
) -> AsyncController:
    """Who decides; ``past``: demand seen before, and when."""
    if settings.controller.policy == "static":
        return StaticController()
    return ControllerProcess(replace(controller_recipe(settings), past=past), first_epoch)


async def recall(application: Application) -> None:
    """Have the controller begin with the load that the store has kept; before ``control`` runs."""
    if application.kept_load is None:
        return
    await application.kept_load.restore()
    past, controller = past_load(application.history, application.unix_offset_s), application.controller
    if past and isinstance(controller, ControllerProcess):
        controller.begin(replace(controller_recipe(application.settings), past=past), 1)


def past_load(history: LoadHistory, offset_s: float) -> tuple[tuple[float, Demand], ...]:
    """What came, and when on this process's clock."""
    return tuple((window.until_unix_s - offset_s, window.demand) for window in history.windows)


def build_reload(
    read: Callable[[], Settings],
    runner: Runner,
    deployment: Deployment,
    operations: Operations,
    control: ControlLoop,
    history: LoadHistory,
    offset_s: float,
    first_epoch: int = 1,
) -> Reload:
    """What follows another configuration, as ``read`` has it, while a cluster is commanded from an epoch on."""

    def controller_of(settings: Settings, epoch: int) -> AsyncController:
        return build_controller(settings, max(epoch, first_epoch), past_load(history, offset_s))

    return Reload(read, load_profiles, controller_of, deployment, runner.publish, operations, control)


def load_profiles(settings: Settings) -> dict[str, EnergyProfile]:
    """The profile of each model. Raises ``UserError`` where one is missing or does not hold for a pool's TP."""
    profiles = {}
    for index, model in enumerate(settings.models):
        try:
            profiles[model.name] = load_profile(model.profile)
        except (ProfileError, OSError) as error:
            raise UserError(f"models[{index}].profile: {error}") from None
    for index, pool in enumerate(settings.pools):
        held = profiles[pool.model].tensor_parallel
        if pool.tp not in held:
            name = profiles[pool.model].name
            raise UserError(
                f"pools[{index}].tp: profile {name} holds for TP {', '.join(map(str, held))}, not {pool.tp}"
            )
    return profiles


def load_tokenizers(settings: Settings) -> dict[str, ExactTokens]:
    """The exact token counter of each model that has one. Raises ``UserError`` for a file it cannot use."""
    counters: dict[str, ExactTokens] = {}
    for index, model in enumerate(settings.models):
        if model.tokenizer_file is not None:
            try:
                counters[model.name] = load_tokenizer(model.tokenizer_file, model.chat_template_file)
            except ValueError as error:
                raise UserError(f"models[{index}].tokenizer_file: {error}") from None
    return counters


def build_driver(settings: Settings) -> InstanceDriver:
    """What starts instances."""
    driver = settings.driver
    match driver.kind:
        case "attach":
            return build_attach_driver(settings)
        case "kubernetes":
            return build_kubernetes_driver(settings)
        case "ray":
            return build_ray_driver(settings)
        case "vllm":
            return build_vllm_driver(settings)
        case "vllm-emulated":
            return build_emulated_device_driver(settings)
    kinds = [(name, node) for node in settings.nodes for name in node.names()]
    return EmulatorDriver(
        [EmulatedMachine(name, node.gpu, node.gpus) for name, node in kinds],
        {
            model.name: EmulatedModel(model.profile, model.tokenizer_file, model.max_model_len)
            for model in settings.models
        },
        processes=driver.processes,
        startup_s=driver.startup_s,
        seed=driver.seed,
        emulators=driver.emulators,
    )


def build_meter(driver: InstanceDriver) -> GpuMeter | None:
    """What reads the GPUs of a driver's nodes; None where nobody can."""
    if isinstance(driver, MeteredDriver):
        return DriverMeter(driver.read_gpus) if driver.metered_nodes else None
    if not isinstance(driver, EmulatorDriver):
        return None

    async def addresses() -> Collection[str]:
        return (await driver.agent_urls()).values()

    return AgentMeter(addresses)


def length_limits(settings: Settings) -> LengthLimits:
    """What bounds length prediction, and what its errors cost; without a capacity table all cost the same."""
    costs = {}
    for model in settings.models:
        with suppress(ProfileError):
            costs[model.name] = LengthCosts.of(load_capacity(model.profile))
    contexts = {model.name: model.max_model_len for model in settings.models}
    return LengthLimits(cuts=settings.slo.cuts, costs=costs, context_tokens=contexts)


def router_limits(limits: LimitSettings) -> RouterLimits:
    """The router's bounds."""
    squash_late_s = float("inf") if limits.squash_late_s is None else limits.squash_late_s
    return RouterLimits(
        queue=QueueLimits(max_depth=limits.queue_requests, ttl_s=limits.queue_ttl_s),
        escalation=EscalationLimits(squash_late_s=squash_late_s),
    )


def proxy_settings(settings: Settings) -> ProxySettings:
    """What the gateway is told. Raises ``UserError`` for a key file that cannot be read."""
    limits = settings.limits
    return ProxySettings(
        slos=ClassSlos(settings.slo.ttft_s, settings.slo.tbt_s, settings.slo.cuts),
        limits=Limits(body_bytes=limits.body_bytes),
        deadlines=Deadlines(
            head_s=limits.header_timeout_s, first_byte_s=limits.first_byte_deadline_s, total_s=limits.request_deadline_s
        ),
        api_keys=(*settings.auth.api_keys, *read_keys(settings.auth.api_keys_file)),
        request_id_prefix=f"req-{secrets.token_hex(4)}-",
        prefix_affinity=prefix_affinity(settings),
        objectives={objective.name: objective.priority for objective in settings.objectives},
    )


def prefix_affinity(settings: Settings) -> bool:
    """Whether it is asked for, or left open and the engines cache prefixes, which the emulator's do not."""
    asked = settings.routing.prefix_affinity
    return settings.driver.kind != "emulator" if asked is None else asked


def read_keys(path: str | None) -> tuple[str, ...]:
    """API keys of a file: one a line, ``#`` begins a comment. Raises ``UserError`` if it cannot be read or has none."""
    if path is None:
        return ()
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise UserError(f"auth.api_keys_file: {path}: {error.strerror}") from None
    keys = tuple(line for line in lines if line)
    if not keys:
        raise UserError(f"auth.api_keys_file: {path}: holds no key; without the setting everybody may call")
    return keys

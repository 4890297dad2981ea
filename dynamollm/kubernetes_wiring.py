"""The Kubernetes driver of a configuration. Starts nothing.

The Kubernetes client is an extra: its modules are imported only where this driver is asked for.
"""

from collections.abc import Callable, Mapping

from prometheus_client.registry import Collector

from dynamollm.adapters.clock import unix_offset_s
from dynamollm.deployment import node_gpus
from dynamollm.errors import UserError
from dynamollm.leadership import Leadership
from dynamollm.settings import Settings
from dynamollm.vllm_wiring import served_models
from energy.gpus import GPUS
from pools.drivers.kubernetes_metrics import ReplicaMetrics
from pools.drivers.kubernetes_objects import PodTemplate
from pools.drivers.port import InstanceDriver
from pools.drivers.vllm_launch import VllmLaunch
from simulator.vllm_device.adapters.device import PROFILE

EMULATED_VLLM = ("python", "-m", "simulator.emulator.adapters.vllm_command")
ANY = "0.0.0.0"  # a pod has an address of its own


def build_kubernetes_driver(settings: Settings) -> InstanceDriver:
    """Raises ``UserError`` where the Kubernetes client is not installed."""
    try:
        from pools.drivers.kubernetes import KubernetesDriver, KubernetesOptions
        from pools.drivers.kubernetes_api import KubernetesApi
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("kubernetes", "aiohttp"):
            raise
        raise UserError(
            "driver.kind: kubernetes needs the extra of that name: pip install 'dynamollm[kubernetes]'"
        ) from None
    chosen, vllm = settings.driver.kubernetes, settings.driver.vllm
    emulated = chosen.engine == "emulated"
    launch = VllmLaunch((vllm.command,), vllm.arguments, vllm.environment, host=ANY, can_park=vllm.can_park)
    environments: Mapping[str, Mapping[str, str]] = {}
    if emulated:
        startup = ("--emulated-startup-s", str(settings.driver.startup_s))
        launch = VllmLaunch(EMULATED_VLLM, (*startup, *vllm.arguments), vllm.environment, host=ANY)
        environments = {model.name: {PROFILE: model.profile} for model in settings.models}
    template = PodTemplate(
        chosen.deployment,
        chosen.image,
        launch,
        chosen.port,
        None if emulated else chosen.gpu_resource,
        chosen.grace_s,
        chosen.service_account,
    )
    return KubernetesDriver(
        KubernetesApi(chosen.namespace, chosen.context),
        node_gpus(settings.nodes),
        served_models(settings, environments),
        template,
        {name: range(g.min_clock_mhz, g.max_clock_mhz + 1, g.clock_step_mhz) for name, g in GPUS.items()},
        KubernetesOptions(vllm.start_timeout_s, chosen.leave_running, chosen.mode == "scale"),
    )


def build_leadership(settings: Settings, store: Leadership, clock: Callable[[], float]) -> Leadership:
    """What decides which controller leads. Raises ``UserError`` where the Kubernetes client is needed and missing."""
    if settings.controller.leadership == "store":
        return store
    try:
        from dynamollm.adapters.kubernetes_lease import KubernetesLease
        from pools.drivers.kubernetes_api import KubernetesApi
    except ModuleNotFoundError:
        raise UserError(
            "controller.leadership: kubernetes needs an extra: pip install 'dynamollm[kubernetes]'"
        ) from None
    chosen, offset_s = settings.driver.kubernetes, unix_offset_s()
    api = KubernetesApi(chosen.namespace, chosen.context)
    return KubernetesLease(api, f"{chosen.deployment}-controller", clock, lambda: clock() + offset_s)


def desired_replicas(settings: Settings, driver: InstanceDriver) -> tuple[Collector, ...]:
    """What tells an autoscaler of a Kubernetes driver's replicas; nothing for any other."""
    if settings.driver.kind != "kubernetes":
        return ()
    from pools.drivers.kubernetes import KubernetesDriver

    assert isinstance(driver, KubernetesDriver)
    namespace = settings.driver.kubernetes.namespace
    return (ReplicaMetrics(namespace, driver.desired, driver.ready, driver.accelerators),)

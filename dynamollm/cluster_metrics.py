"""The cluster and who commands it, as Prometheus metrics: instances, GPUs, clocks, load; ticks, plans, operations.

Read when scraped from what the runner, the control loop and the operations already know: nothing is counted twice, and
nothing here is on a request's path. Label sets: pools x TP x clocks x states of instances, and kinds of actions. Pure.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamollm.counterfactual import Comparison
from dynamollm.operations import Outcome
from pools.instances import Instance
from proxy.metrics import Histogram
from solver.control import Action

_MHZ = 1e6
_SHAPE = ("gen_ai_request_model", "pool", "tp", "sm_clock_mhz", "state")
_POOL = ("gen_ai_request_model", "pool")
PLAN_GAUGES: Mapping[str, tuple[str, str]] = {
    "power_w": ("dynamollm_plan_power_watts", "Power the last plan predicts for the whole cluster"),
    "gap": ("dynamollm_plan_gap_ratio", "Proven distance of the last plan to the optimum, relative"),
    "solve_s": ("dynamollm_plan_solve_seconds", "Time the last plan took to solve"),
    "served": ("dynamollm_plan_served_ratio", "Share of the reserve the last plan can serve"),
    "forecast_rps": ("dynamollm_plan_forecast_requests_per_second", "Mean rate the last plan was made for"),
    "reserve_rps": ("dynamollm_plan_reserve_requests_per_second", "Rate the last plan holds capacity for"),
    "observed_rps": ("dynamollm_plan_observed_requests_per_second", "Rate seen when the last plan was made"),
}
"""What a controller says of a plan (``Diagnostic.numbers``) -> metric name and text."""

TOPICS = ("plan", "cluster", "clock", "escalation")  # of a controller's diagnostics


class Fleet(Protocol):
    """What runs now (``dynamollm.deployment.Deployment``)."""

    @property
    def instances(self) -> Mapping[str, Instance]:
        """By id."""

    @property
    def gpus(self) -> int:
        """GPUs there are."""


class Compared(Protocol):
    """What else would have been used (``dynamollm.counterfactual.Counterfactual``)."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """One a policy."""


class FleetMetrics(Collector):
    """Instances and the GPUs they hold; register it beside the others."""

    def __init__(self, fleet: Fleet, in_flight: Callable[[str], int]) -> None:
        """``in_flight``: requests sent to an instance that have not ended."""
        self._fleet = fleet
        self._in_flight = in_flight

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as Prometheus reads it."""
        counts: Counter[tuple[str, ...]] = Counter()
        gpus: Counter[tuple[str, ...]] = Counter()
        gpu_mhz: Counter[tuple[str, ...]] = Counter()
        in_flight: Counter[tuple[str, ...]] = Counter()
        for instance in self._fleet.instances.values():
            shape, pool = instance.shape, (instance.shape.model, instance.pool)
            counts[(*pool, str(shape.tp), str(instance.sm_clock_mhz), instance.state.value)] += 1
            gpus[pool] += shape.tp
            gpu_mhz[pool] += shape.tp * instance.sm_clock_mhz
            in_flight[pool] += self._in_flight(instance.id)
        yield _gauge("dynamollm_instances", "Instances", _SHAPE, counts)
        yield _gauge("dynamollm_held_gpus", "GPUs that instances hold", _POOL, gpus)
        hertz = {pool: gpu_mhz[pool] / gpus[pool] * _MHZ for pool in gpus}
        yield _gauge("dynamollm_sm_clock_hertz", "Mean SM clock of those GPUs", _POOL, hertz)
        yield _gauge("dynamollm_in_flight_requests", "Requests sent to instances and not ended", _POOL, in_flight)
        yield GaugeMetricFamily("dynamollm_gpus", "GPUs of the cluster", value=self._fleet.gpus)


class ControlCounts(Protocol):
    """What a control loop counts (``dynamollm.control_loop.ControlLoop``)."""

    @property
    def ticks(self) -> int:
        """Calls of the controller."""

    @property
    def tick_s(self) -> Histogram:
        """From the observation to the answer."""

    @property
    def topics(self) -> Mapping[str, int]:
        """Diagnostics by topic."""

    @property
    def plan_numbers(self) -> Mapping[str, float]:
        """What the controller last said of a plan."""


class OperationCounts(Protocol):
    """What operations count (``dynamollm.operations.Operations``)."""

    @property
    def counts(self) -> Mapping[tuple[str, Outcome], int]:
        """Actions that have ended, by kind and outcome."""

    @property
    def busy(self) -> int:
        """Actions under way."""

    @property
    def newest(self) -> tuple[int, int]:
        """(epoch, version) of the newest plan seen."""


class ControlMetrics(Collector):
    """Ticks, plans and what became of their actions; register it where the control loop runs."""

    def __init__(self, control: ControlCounts, operations: OperationCounts) -> None:
        self._control = control
        self._operations = operations

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as Prometheus reads it."""
        control, operations = self._control, self._operations
        yield CounterMetricFamily("dynamollm_control_ticks", "Calls of the controller", value=control.ticks)
        yield control.tick_s.collect()
        decisions = CounterMetricFamily("dynamollm_decisions", "What the controller explained", labels=("topic",))
        for topic, count in (dict.fromkeys(TOPICS, 0) | dict(control.topics)).items():
            decisions.add_metric((topic,), count)
        yield decisions
        for key, (name, text) in PLAN_GAUGES.items():
            if key in control.plan_numbers:
                yield GaugeMetricFamily(name, text, value=control.plan_numbers[key])
        epoch, version = operations.newest
        yield GaugeMetricFamily("dynamollm_plan_epoch", "Epoch of the plan in force", value=epoch)
        yield GaugeMetricFamily("dynamollm_plan_version", "Version of the plan in force", value=version)
        ended = CounterMetricFamily("dynamollm_operations", "Actions that have ended", labels=("action", "outcome"))
        # those that have not happened are 0: a rate sees the first one only if there was a sample before it
        never = {(action.__name__, outcome): 0 for action in get_args(Action) for outcome in Outcome}
        for (action, outcome), count in (never | dict(operations.counts)).items():
            ended.add_metric((action, outcome.value), count)
        yield ended
        yield GaugeMetricFamily("dynamollm_operations_under_way", "Actions under way", value=operations.busy)


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


class SavingsMetrics(Collector):
    """What other policies would have used; nothing where nothing is compared."""

    def __init__(self, counterfactual: Compared | None) -> None:
        self._counterfactual = counterfactual

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One value a policy, all of the same stretch of time."""
        comparisons = self._counterfactual.comparisons if self._counterfactual else ()
        families = (
            ("dynamollm_counterfactual_joules", "What the policy would have used for the same requests", "energy_j"),
            ("dynamollm_counterfactual_band_joules", "By how much that may be wrong", "band_j"),
            ("dynamollm_saved_joules", "That less what was used; negative: used more", "saved_j"),
        )
        for name, text, field in families:
            family = GaugeMetricFamily(name, text, labels=("policy",))
            for comparison in comparisons:
                family.add_metric((comparison.policy,), getattr(comparison, field))
            yield family

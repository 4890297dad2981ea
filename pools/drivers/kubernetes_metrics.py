"""Desired and current replicas of each Deployment, for whoever scales them: HPA, KEDA, dashboards.

Names and labels are those of the Workload Variant Autoscaler, so that adapters made for it read these as they are.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ("variant_name", "namespace", "accelerator_type")


class ReplicaMetrics(Collector):
    """Reads when it is scraped."""

    def __init__(
        self,
        namespace: str,
        desired: Callable[[], Mapping[str, int]],
        current: Callable[[], Mapping[str, int]],
        accelerators: Callable[[], Mapping[str, str]],
    ) -> None:
        """All by the name of a Deployment; ``accelerators``: the kind of GPU it runs on."""
        self._namespace = namespace
        self._desired = desired
        self._current = current
        self._accelerators = accelerators

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Both gauges, and their ratio (desired where there are none)."""
        desired = GaugeMetricFamily("wva_desired_replicas", "Replicas the plan wants", labels=LABELS)
        current = GaugeMetricFamily("wva_current_replicas", "Replicas that are ready", labels=LABELS)
        ratio = GaugeMetricFamily("wva_desired_ratio", "Desired replicas for each ready one", labels=LABELS)
        ready, accelerators = self._current(), self._accelerators()
        for name, count in self._desired().items():
            labels = (name, self._namespace, accelerators.get(name, ""))
            desired.add_metric(labels, count)
            current.add_metric(labels, ready.get(name, 0))
            ratio.add_metric(labels, count / (ready.get(name, 0) or 1))
        return desired, current, ratio

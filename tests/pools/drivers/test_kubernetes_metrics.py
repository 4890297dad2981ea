"""Desired replicas under the names that autoscalers read."""

from prometheus_client import CollectorRegistry, generate_latest

from pools.drivers.kubernetes_metrics import ReplicaMetrics


def test_desired_replicas_are_told_as_the_workload_variant_autoscaler_does():
    registry = CollectorRegistry()
    desired = {"prod-tiny-ss-tp2": 3, "prod-tiny-ll-tp8": 0}
    registry.register(
        ReplicaMetrics(
            "serving", lambda: desired, lambda: {"prod-tiny-ss-tp2": 2}, lambda: {"prod-tiny-ss-tp2": "H100"}
        )
    )
    labels = {"variant_name": "prod-tiny-ss-tp2", "namespace": "serving", "accelerator_type": "H100"}
    assert registry.get_sample_value("wva_desired_replicas", labels) == 3
    assert registry.get_sample_value("wva_current_replicas", labels) == 2
    assert registry.get_sample_value("wva_desired_ratio", labels) == 1.5
    none = {"variant_name": "prod-tiny-ll-tp8", "namespace": "serving", "accelerator_type": ""}
    assert registry.get_sample_value("wva_desired_replicas", none) == 0
    desired["prod-tiny-ll-tp8"] = 4
    assert registry.get_sample_value("wva_desired_ratio", none) == 4
    assert b"wva_desired_replicas" in generate_latest(registry)

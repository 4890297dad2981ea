"""The ledger's sums as Prometheus metrics: joules by phase, grams of CO2 and money, since the start. Pure."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from energy.accounting import EnergyRow
from energy.accounting_ledger import EnergyLedger

PHASES = ("prefill", "decode", "idle", "transition")
_LABELS = ("gen_ai_request_model", "pool", "request_class")


class LedgerMetrics(Collector):
    """Register it beside the gateway's own. Its label sets are as many as models x pools x classes, and tenants."""

    def __init__(self, ledger: EnergyLedger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Every family, as Prometheus reads it."""
        joules = CounterMetricFamily(
            "dynamollm_energy_joules", "Energy of requests, and besides", labels=(*_LABELS, "phase")
        )
        carbon = CounterMetricFamily("dynamollm_co2_grams", "CO2 of that energy", labels=_LABELS)
        money = CounterMetricFamily("dynamollm_cost_usd", "GPU time and electricity", labels=(*_LABELS, "kind"))
        for user, row in self._ledger.totals.items():
            labels = (user.model, user.pool, user.request_class)
            for phase, energy_j in zip(PHASES, _phases(row), strict=True):
                if energy_j:
                    joules.add_metric((*labels, phase), energy_j)
            carbon.add_metric(labels, row.co2_g)
            money.add_metric((*labels, "gpu"), row.gpu_usd)
            money.add_metric((*labels, "electricity"), row.electricity_usd)
        by_tenant = CounterMetricFamily(
            "dynamollm_tenant_energy_joules", "Energy of requests, by tenant", labels=("tenant",)
        )
        for tenant, energy_j in self._ledger.tenant_j.items():
            by_tenant.add_metric((tenant,), energy_j)
        metered = CounterMetricFamily("dynamollm_metered_joules", "Energy of all meters", value=self._ledger.metered_j)
        return (joules, carbon, money, by_tenant, metered)


def _phases(row: EnergyRow) -> tuple[float, float, float, float]:
    return row.prefill_j, row.decode_j, row.idle_j, row.transition_j

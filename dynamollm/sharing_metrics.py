"""What a process of several has to do with the others, as Prometheus metrics: store, lead, the ledger's backlog.

Read when scraped from what the replica or the commander knows; nothing here is on a request's path. Pure.
"""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamollm.cluster_metrics import ControlMetrics, FleetMetrics
from dynamollm.commander import Commander
from dynamollm.ledger_feed import LedgerFeed
from dynamollm.replica import Replica
from dynamollm.term import ControllerTerm
from energy.accounting_metrics import LedgerMetrics

_REACHABLE = "dynamollm_store_reachable", "Whether the shared store answered last time"


class ReplicaMetrics(Collector):
    """A gateway among others; register it beside the gateway's own."""

    def __init__(self, replica: Replica, feed: LedgerFeed) -> None:
        self._replica = replica
        self._feed = feed

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as Prometheus reads it."""
        replica, feed = self._replica, self._feed
        yield GaugeMetricFamily(*_REACHABLE, value=not replica.store_away)
        yield GaugeMetricFamily("dynamollm_peer_gateways", "Other gateways heard lately", value=replica.peers)
        yield GaugeMetricFamily("dynamollm_followed_epoch", "Epoch of the cluster routed to", value=replica.follows[0])
        yield GaugeMetricFamily("dynamollm_ledger_backlog", "Entries the leader has not booked", value=feed.backlog)
        yield CounterMetricFamily(
            "dynamollm_ledger_lost", "Entries that went beyond the feed's bound", value=feed.lost_entries
        )


class CommanderMetrics(Collector):
    """A controller, and while it leads, all that it commands."""

    def __init__(self, commander: Commander[ControllerTerm]) -> None:
        self._commander = commander

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as Prometheus reads it."""
        candidate, term = self._commander.candidate, self._commander.term
        yield GaugeMetricFamily(*_REACHABLE, value=candidate.reachable)
        yield GaugeMetricFamily("dynamollm_controller_leads", "Whether this controller leads", value=candidate.leads)
        yield GaugeMetricFamily("dynamollm_controller_epoch", "Epoch of its term; 0: none", value=candidate.epoch)
        if term is not None:
            yield CounterMetricFamily(
                "dynamollm_ledger_lost_batches", "Batches of gateways that never came", value=term.tail.lost_batches
            )
            for collector in (
                LedgerMetrics(term.ledger),
                FleetMetrics(term.deployment, term.router.in_flight),
                ControlMetrics(term.control, term.operations),
            ):
                yield from collector.collect()

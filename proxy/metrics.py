"""GatewayMetrics: counts and histograms kept in plain lists and dicts, handed to prometheus_client when scraped.

Names and buckets: OpenTelemetry GenAI in its Prometheus spelling, finer below 100 ms where the SLOs are. The number of
label sets is bounded: models and tenants beyond the limit are counted as ``other``.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from operator import sub
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pools.classes import RequestClass
from proxy.outcome import Outcome

TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TPOT_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TBT_BUCKETS_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5, 1.0)
DURATION_BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
OTHER = "other"
_COUNTED_TOGETHER = 64  # well under a millisecond, and the counting code stays in the processor's cache

Labels = tuple[str, ...]


class Counter:
    """A family of counts by label values."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], limit: int = 1000) -> None:
        self.name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._limit = limit
        self._cells: dict[Labels, list[float]] = {}  # one count each

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        self.cell(labels)[0] += amount

    def cell(self, labels: Labels) -> list[float]:
        """What is counted for one set of labels: keep it to count without looking for it."""
        cell = self._cells.get(labels)
        if cell is None:
            if len(self._cells) >= self._limit:
                labels = (OTHER,) * len(self._labels)
            cell = self._cells.setdefault(labels, [0.0])
        return cell

    def value(self, labels: Labels) -> float:
        """The count so far."""
        return self._cells.get(labels, (0.0,))[0]

    def collect(self) -> Metric:
        """As Prometheus reads it."""
        family = CounterMetricFamily(self.name, self._documentation, labels=self._labels)
        for labels, (count,) in self._cells.items():
            family.add_metric(labels, count)
        return family


class Histogram:
    """A family of histograms with fixed upper bounds, by label values."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], bounds: Sequence[float], limit: int = 1000
    ) -> None:
        self.name = name
        self.bounds = tuple(bounds)
        self._documentation = documentation
        self._labels = tuple(labels)
        self._limit = limit
        self._cells: dict[Labels, list[float]] = {}  # one count a bucket, the last one open; then the sum

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        cells = self.cells(labels)
        cells[bisect_left(self.bounds, value)] += 1
        cells[-1] += value

    def observe_gaps(self, labels: Labels, times_s: Sequence[float]) -> None:
        """Count the times between these, in order; nothing is interpreted for each of them."""
        cells = self.cells(labels)
        gaps_s = list(map(sub, islice(times_s, 1, None), times_s))
        for bucket, count in Tally(map(bisect_left, repeat(self.bounds), gaps_s)).items():
            cells[bucket] += count
        cells[-1] += sum(gaps_s)

    def cells(self, labels: Labels) -> list[float]:
        """What is counted for one set of labels: keep it to count without looking for it."""
        return self._cells.get(labels) or self._new(labels)

    def count(self, labels: Labels) -> int:
        """How many values were counted."""
        return int(sum(self._cells.get(labels, (0.0,))[:-1]))

    def collect(self) -> Metric:
        """As Prometheus reads it."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=self._labels)
        for labels, cells in self._cells.items():
            running = 0.0
            buckets = []
            for bound, count in zip((*map(str, self.bounds), "+Inf"), cells, strict=False):
                running += count
                buckets.append((bound, running))
            family.add_metric(labels, buckets, cells[-1])
        return family

    def _new(self, labels: Labels) -> list[float]:
        if len(self._cells) >= self._limit:
            labels = (OTHER,) * len(self._labels)
        return self._cells.setdefault(labels, [0.0] * (len(self.bounds) + 2))


class _Cells(NamedTuple):
    """Where requests of one (model, class, pool) are counted."""

    labels: Labels
    statuses: dict[int, list[float]]
    duration: list[float]
    input_tokens: list[float]
    output_tokens: list[float]


class _TenantCells(NamedTuple):
    """Where a tenant's are."""

    requests: list[float]
    input_tokens: list[float]
    output_tokens: list[float]


class _Lone(NamedTuple):
    """Stands in for a registry of one family."""

    family: Metric

    def collect(self) -> Iterator[Metric]:
        """The family."""
        yield self.family


class GatewayMetrics(Collector):
    """All the gateway counts."""

    def __init__(self, label_limit: int = 1000) -> None:
        by_class = ("gen_ai_request_model", "request_class", "pool")

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, label_limit)

        def histogram(name: str, documentation: str, bounds: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, documentation, labels, bounds, label_limit)

        self.requests = counter("dynamollm_requests", "Requests answered", *by_class, "status")
        self.refused = counter("dynamollm_refused_requests", "Requests refused before routing", "status")
        self.cancelled = counter("dynamollm_cancelled_requests", "Requests whose client left", *by_class)
        self.retries = counter("dynamollm_retries", "Requests sent to a second instance", "pool")
        self.failures = counter("dynamollm_instance_failures", "Attempts an instance failed", "instance", "kind")
        self.dropped = counter("dynamollm_dropped_requests", "Requests not served", "reason")
        self.invalid = counter("dynamollm_invalid_controls", "Control headers and fields ignored", "control")
        self.tenant_requests = counter("dynamollm_tenant_requests", "Requests answered, by tenant", "tenant")
        self.tenant_tokens = counter("dynamollm_tenant_tokens", "Tokens, by tenant", "tenant", "gen_ai_token_type")
        self.slo_met = counter("dynamollm_slo_requests", "Requests by whether they met their SLO", *by_class, "met")
        self.ttft = histogram(
            "gen_ai_server_time_to_first_token_seconds", "Request received to first event", TTFT_BUCKETS_S, *by_class
        )
        self.tpot = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per token after the first",
            TPOT_BUCKETS_S,
            *by_class,
        )
        self.tbt = histogram(
            "dynamollm_time_between_chunks_seconds", "Gap between events of a stream", TBT_BUCKETS_S, *by_class
        )
        self.duration = histogram(
            "gen_ai_server_request_duration_seconds", "Request received to last byte", DURATION_BUCKETS_S, *by_class
        )
        self.tokens = histogram(
            "gen_ai_client_token_usage", "Tokens a request", TOKEN_BUCKETS, *by_class, "gen_ai_token_type"
        )
        self.loop_lag = histogram("dynamollm_event_loop_lag_seconds", "Lateness of a timer", LAG_BUCKETS_S)
        self._ended: list[Outcome] = []
        self._cells: dict[tuple[str, RequestClass, str | None], _Cells] = {}
        self._tenants: dict[str, _TenantCells] = {}
        self._label_limit = label_limit
        self._gauges: dict[str, tuple[str, float]] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.answer: Callable[[], Iterator[bytes]] = self.parts  # to a scrape; of several processes, all pages in one

    def count(self, outcome: Outcome) -> None:
        """Count how a request ended; done for many at a time, and before anybody looks."""
        ended = self._ended
        ended.append(outcome)
        if len(ended) >= _COUNTED_TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Count those that ended since the last time."""
        ended, self._ended = self._ended, []
        for outcome in ended:
            request = outcome.request
            cells = self._cells.get((request.model, request.request_class, outcome.pool)) or self._make_cells(outcome)
            labels, statuses, durations, inputs, outputs = cells
            (statuses.get(outcome.status) or self._make_status(cells, outcome.status))[0] += 1.0
            requests, tenant_inputs, tenant_outputs = self._tenants.get(request.tenant) or self._make_tenant(
                request.tenant
            )
            requests[0] += 1.0
            duration_s = outcome.ended_s - request.arrival_s
            durations[bisect_left(DURATION_BUCKETS_S, duration_s)] += 1.0
            durations[-1] += duration_s
            tokens = outcome.prompt_tokens
            if tokens is not None:
                inputs[bisect_left(TOKEN_BUCKETS, tokens)] += 1.0
                inputs[-1] += tokens
                tenant_inputs[0] += tokens
            tokens = outcome.completion_tokens
            if tokens is not None:
                outputs[bisect_left(TOKEN_BUCKETS, tokens)] += 1.0
                outputs[-1] += tokens
                tenant_outputs[0] += tokens
            if outcome.cancelled:
                self.cancelled.add(labels)
            if outcome.streamed and outcome.first_token_s is not None:
                self._count_latency(outcome, outcome.first_token_s, labels)

    def _make_cells(self, outcome: Outcome) -> "_Cells":
        """The cells of a (model, class, pool); with too many of them the histograms merge, not we."""
        request = outcome.request
        labels = (request.model, request.request_class.name, outcome.pool or "")
        cells = _Cells(
            labels,
            {},
            self.duration.cells(labels),
            self.tokens.cells((*labels, "input")),
            self.tokens.cells((*labels, "output")),
        )
        if len(self._cells) < self._label_limit:
            self._cells[request.model, request.request_class, outcome.pool] = cells
        return cells

    def _make_status(self, cells: "_Cells", status: int) -> list[float]:
        cell = cells.statuses[status] = self.requests.cell((*cells.labels, str(status)))
        return cell

    def _make_tenant(self, tenant: str) -> "_TenantCells":
        cells = _TenantCells(
            self.tenant_requests.cell((tenant,)),
            self.tenant_tokens.cell((tenant, "input")),
            self.tenant_tokens.cell((tenant, "output")),
        )
        if len(self._tenants) < self._label_limit:
            self._tenants[tenant] = cells
        return cells

    def _count_latency(self, outcome: Outcome, first_token_s: float, labels: Labels) -> None:
        request = outcome.request
        ttft_s = first_token_s - request.arrival_s
        self.ttft.observe(labels, ttft_s)
        met = ttft_s <= request.slo.ttft_s
        tokens = outcome.completion_tokens
        if tokens is not None and tokens > 1:
            tpot_s = (outcome.ended_s - first_token_s) / (tokens - 1)
            self.tpot.observe(labels, tpot_s)
            met = met and tpot_s <= request.slo.tbt_s
        if not outcome.cancelled:
            self.slo_met.add((*labels, "true" if met else "false"))

    def parts(self) -> Iterator[bytes]:
        """All of the registry in Prometheus' text format, as it is now; whoever asks does other things in between."""
        for family in list(self.registry.collect()):
            yield generate_latest(_Lone(family))  # it asks for nothing but ``collect``

    def set_gauge(self, name: str, documentation: str, value: float) -> None:
        """A gauge, as it is now."""
        self._gauges[name] = (documentation, value)

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed: families are made when scraped."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family, as Prometheus reads it."""
        self.settle()
        for family in vars(self).values():
            if isinstance(family, Counter | Histogram):
                yield family.collect()
        for name, (documentation, value) in self._gauges.items():
            yield GaugeMetricFamily(name, documentation, value=value)

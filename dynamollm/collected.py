"""Collected: all gateways together, as their reports say; to a controller what the router is to a gateway's own. Pure.

Totals of gateways that come and go only ever rise: of one not heard of before, what it counted until then is not news.
A silent gateway is no more counted once its report has lapsed; while nothing at all can be heard, the last word stands.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

from dynamollm.reports import GatewayReport, Totals
from dynamollm.store import NEVER, Stamp
from pools.classes import REQUEST_CLASSES, RequestClass
from pools.fleet import InstanceCounts
from pools.peers import PeerLoad, together
from pools.traffic import ClassTraffic

Key = tuple[str, int]
_FIELDS = 4


class Collected:
    """Give it every set of reports with ``take``."""

    def __init__(self, on_share: Callable[[str, float, int], None] = lambda instance_id, share, late: None) -> None:
        """``on_share``: told the worst share of an SLO used on an instance, as each gateway saw it lately.

        And how many more requests that gateway found late there.
        """
        self.on_share = on_share
        self.heard = False  # whether the last attempt to hear succeeded
        self.reports: Mapping[str, GatewayReport] = {}
        self._loads: Mapping[str, PeerLoad] = {}
        self._totals: dict[Key, list[int]] = defaultdict(lambda: [0] * _FIELDS)
        self._given: dict[str, list[int]] = defaultdict(lambda: [0] * len(REQUEST_CLASSES))

    @property
    def traffic(self) -> "Collected":
        """See ``dynamollm.observation.Counted``."""
        return self

    @property
    def queue(self) -> "Collected":
        """See ``dynamollm.observation.Counted``."""
        return self

    def take(self, reports: Mapping[str, GatewayReport]) -> None:
        """Take in what gateways say now."""
        for name, report in reports.items():
            before = self.reports.get(name)
            late = {}
            if before is not None and report.at_unix_s > before.at_unix_s:
                self._count(before, report)
                late = {i: count - before.late.get(i, 0) for i, count in report.late.items()}
            for instance_id, share in report.shares.items():
                self.on_share(instance_id, share, late.get(instance_id, 0))
        self.heard = True
        self.reports = dict(reports)
        self._loads = together(report.loads for report in reports.values())

    def lost(self) -> None:
        """Nothing could be heard: the last word stands, and is not to be trusted for anything new."""
        self.heard = False

    def _count(self, before: GatewayReport, now: GatewayReport) -> None:
        known = {(t.model, t.request_class): _counts(t) for t in before.totals}
        for total in now.totals:
            key = (total.model, total.request_class)
            sums = self._totals[key]
            for k, (new, old) in enumerate(zip(_counts(total), known.get(key, (0,) * _FIELDS), strict=True)):
                sums[k] += new - old
        for instance_id, given in now.given.items():
            old_given = before.given.get(instance_id, (0,) * len(given))
            rows = self._given[instance_id]
            for k, (new, old) in enumerate(zip(given, old_given, strict=True)):
                rows[k] += new - old

    # --- what is asked ------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[tuple[str, RequestClass], ClassTraffic]:
        """Requests that came and went since this began to listen, by model and class."""
        return {(model, RequestClass(c)): ClassTraffic(*sums) for (model, c), sums in self._totals.items()}

    @property
    def depth(self) -> int:
        """Requests that wait in any gateway."""
        return sum(self.depths().values())

    def depths(self) -> dict[Key, int]:
        """Requests that wait in any gateway, by model and class."""
        depths: dict[Key, int] = defaultdict(int)
        for report in self.reports.values():
            for total in report.totals:
                if total.queued:
                    depths[total.model, total.request_class] += total.queued
        return dict(depths)

    def counts(self) -> dict[str, InstanceCounts]:
        """What is on each instance."""
        nothing = PeerLoad()
        return {
            instance_id: InstanceCounts(
                (load := self._loads.get(instance_id, nothing)).in_flight,
                load.pending_tokens,
                load.context_tokens,
                tuple(self._given[instance_id]),
            )
            for instance_id in {*self._loads, *self._given}
        }

    def in_flight(self, instance_id: str) -> int:
        """Requests that any gateway has on an instance."""
        load = self._loads.get(instance_id)
        return round(load.in_flight) if load else 0

    def behind(self, stamp: Stamp) -> int:
        """Gateways that route by an older cluster than this."""
        return sum(tuple(report.follows) < stamp for report in self.reports.values())

    @property
    def highest_epoch(self) -> int:
        """The highest that any gateway follows."""
        return max((report.follows[0] for report in self.reports.values()), default=NEVER[0])


def _counts(total: Totals) -> tuple[int, int, int, int]:
    return total.arrived, total.input_tokens, total.finished, total.output_tokens

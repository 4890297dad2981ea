"""LoadHistory: how many requests came in each slot of the past weeks, and what the same slots say of the time to come.

Source: DynamoLLM section IV, load predictor: templates of 300 s slots, the median of the same slots of past weeks.
While there are none, the same time of other days of the same kind (weekday, weekend), else of any day. Slots are
counted from the Unix epoch, so a history survives a restart. Bounded to four weeks. Pure.
"""

from typing import Any

import numpy as np

from solver.control import Demand

SLOT_S = 300.0
DAY = 288  # slots
WEEK = 7 * DAY
KEPT = 4 * WEEK
SMOOTHED = 3  # neighbours on either side that stand for a slot too: one slot of one day is mostly noise
_THURSDAY = 3  # 1 January 1970; Monday is 0
_FORMAT = 1


class LoadHistory:
    """Requests/s by slot, all classes together."""

    def __init__(self, unix_offset_s: float = 0.0) -> None:
        """``unix_offset_s`` is what makes ``now_s`` the time of day; 0 where nobody knows it."""
        self._offset_s = unix_offset_s
        self._rates: dict[int, float] = {}  # rising
        self._templates: dict[int, float | None] = {}  # of what is kept now
        self._slot = -1
        self._requests = 0.0
        self._span_s = 0.0

    def observe(self, now_s: float, demand: Demand) -> tuple[int, float] | None:
        """Take in a window that ends now; the slot that it closed and its rate, if one was seen by half at least."""
        slot = self.slot_of(now_s - 0.5 * demand.window_s)
        closed = None
        if slot != self._slot:
            if self._span_s >= 0.5 * SLOT_S and slot > self._slot:
                closed = self._slot, self._requests / self._span_s
                self._keep(*closed)
            self._slot, self._requests, self._span_s = slot, 0.0, 0.0
        self._requests += float(demand.requests.sum())
        self._span_s += demand.window_s
        return closed

    def slot_of(self, now_s: float) -> int:
        """The slot a moment lies in."""
        return int((now_s + self._offset_s) // SLOT_S)

    def template(self, slot: int) -> float | None:
        """Requests/s to expect in a slot by what it was in other weeks or days; None where nothing is known of it."""
        if slot not in self._templates:
            self._templates[slot] = self._made(slot)
        return self._templates[slot]

    def _keep(self, slot: int, rate_rps: float) -> None:
        self._rates.pop(slot, None)
        self._rates[slot] = rate_rps
        while self._rates and next(iter(self._rates)) <= slot - KEPT:
            del self._rates[next(iter(self._rates))]
        self._templates.clear()

    def _made(self, slot: int) -> float | None:
        weeks = [slot - n * WEEK for n in range(1, KEPT // WEEK + 1)]
        days = [slot - n * DAY for n in range(1, KEPT // DAY + 1)]
        alike = [day for day in days if _weekend(day) == _weekend(slot)]
        for others in (weeks, alike, days):
            known = [rate for rate in map(self._around, others) if rate is not None]
            if known:
                return float(np.median(known))
        return None

    def _around(self, slot: int) -> float | None:
        seen = [rate for n in range(-SMOOTHED, SMOOTHED + 1) if (rate := self._rates.get(slot + n)) is not None]
        return sum(seen) / len(seen) if seen else None

    def snapshot(self) -> dict[str, Any]:
        """The slots, as plain values."""
        return {"version": _FORMAT, "slots": list(self._rates), "rates": [round(r, 4) for r in self._rates.values()]}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot instead of what is known. Raises ``ValueError`` if it is not one."""
        if snapshot.get("version") != _FORMAT:
            raise ValueError("load history: another version; delete it to start anew")
        rates = {int(s): float(r) for s, r in zip(snapshot["slots"], snapshot["rates"], strict=True)}
        if not all(np.isfinite(rate) and rate >= 0.0 for rate in rates.values()):
            raise ValueError("load history: a rate is negative or not finite; delete the history")
        self._rates = dict(sorted(rates.items())[-KEPT:])
        self._templates.clear()


def _weekend(slot: int) -> bool:
    return (slot // DAY + _THURSDAY) % 7 >= 5

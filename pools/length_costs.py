"""LengthCosts: what it costs, in joules a request, to take an answer for shorter or longer than it turns out to be.

Both errors are priced from the capacity table of the model, per input size. What counts is which class asks for more,
and that is not always the longer answer: behind a long prompt a short one has few tokens to make up for the prefills
of others in, so an instance carries fewer of them within the SLO.

- planned for more than it takes, capacity is READY and unused: the difference of both classes' least energy a request;
- planned for less, it is repaired at the highest clock (escalation), which costs more than the planned point; and the
  part of its work that nobody planned for breaks SLOs, its own and of those that wait behind it: ``BROKEN`` requests'
  worth of that part is wasted.

Source of the two kinds of damage: DynamoLLM, mispredictions.
"""

from dataclasses import dataclass

import numpy as np

from energy.capacity import CapacityTable
from pools.classes import REQUEST_CLASSES, RequestClass

SIZES = 3
BROKEN = 3.0  # of 1, 3 and 10, the least energy at equal SLOs in the simulated conversation hour
Row = tuple[float, float, float]
EVEN: tuple[Row, ...] = ((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (2.0, 1.0, 0.0))


@dataclass(frozen=True, slots=True)
class LengthCosts:
    """``joules[input size][chosen output size][true output size]``; 0 where both are the same."""

    joules: tuple[tuple[Row, ...], ...] = (EVEN,) * SIZES

    def cheapest(self, input_size: int, shares: Row) -> int:
        """The output size that costs least if the true one has these probabilities; of equals the smallest."""
        a, b, c = shares
        (_, short_b, short_c), (medium_a, _, medium_c), (long_a, long_b, _) = self.joules[input_size]
        short = short_b * b + short_c * c
        medium = medium_a * a + medium_c * c
        long = long_a * a + long_b * b
        if short <= medium and short <= long:
            return 0
        return 1 if medium <= long else 2

    @staticmethod
    def of(table: CapacityTable) -> "LengthCosts":
        """The costs on this hardware; a class that the table cannot serve costs what the next shorter one does."""
        least, top = _joules(table, slice(None)), _joules(table, slice(-1, None))
        every = []
        for i in range(SIZES):
            classes = [RequestClass.of_sizes(i, o) for o in range(SIZES)]
            plan = _filled([least[k] for k in classes])
            rush = [max(a, b) for a, b in zip(_filled([top[k] for k in classes]), plan, strict=True)]
            rows = [[_cost(plan, rush, c, t) for t in range(SIZES)] for c in range(SIZES)]
            every.append(tuple((row[0], row[1], row[2]) for row in rows))
        return LengthCosts(tuple(every))


def _joules(table: CapacityTable, clocks: slice) -> list[float]:
    """Least energy of one request of each class over TP, these clocks, and load; inf where none is served."""
    rate = table.max_rate[:, clocks, :, None] * np.asarray(table.loads)[1:]
    power_w = table.power[:, clocks, :, 1:]
    with np.errstate(divide="ignore"):
        joules = np.where(rate > 0.0, power_w / rate, np.inf)
    return [float(joules[:, :, k].min()) for k in range(len(REQUEST_CLASSES))]


def _cost(plan: list[float], rush: list[float], chosen: int, true: int) -> float:
    """What is planned for ``chosen`` and is ``true``."""
    if chosen == true:
        return 0.0
    if plan[chosen] > plan[true]:
        return plan[chosen] - plan[true]
    return rush[true] - plan[true] + BROKEN * (plan[true] - plan[chosen])


def _filled(joules: list[float]) -> list[float]:
    """Without gaps: what nobody serves costs what the next shorter does, else the next longer; nothing if none."""
    served = [value for value in joules if np.isfinite(value)]
    known, out = served[0] if served else 0.0, []
    for value in joules:
        known = value if np.isfinite(value) else known
        out.append(known)
    return out

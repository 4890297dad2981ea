"""Pace: a load that moves faster than life, as a recorded trace replayed at ten times its pace. Pure.

Forecasts and plans are made for loads that change over minutes and hours. Where an hour passes in six minutes there
would be three plans of it, made of a mean that is nearly as long as the whole; counted in the load's own time they are
what they are in life. What engines and requests take is not of that time and stays: clocks, SLOs, surges, starts.
"""

from dataclasses import dataclass, replace

from solver.control import Demand
from solver.forecast import Forecast, Forecaster
from solver.policies import Periods


@dataclass(frozen=True, slots=True)
class PacedForecaster:
    """A ``Forecaster`` that counts in the load's time: rates are the clock's, moments and spans ``pace`` times it."""

    inner: Forecaster
    pace: float

    def observe(self, now_s: float, demand: Demand) -> None:
        """Take in what arrived in the window that ends now, as so much in a longer one."""
        pace = self.pace
        self.inner.observe(
            now_s * pace,
            replace(
                demand,
                window_s=demand.window_s * pace,
                requests=demand.requests * pace,
                input_tokens=demand.input_tokens * pace,
                output_tokens=demand.output_tokens * pace,
            ),
        )

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What to expect from now until ``horizon_s`` later, by the clock."""
        return self.inner.forecast(now_s * self.pace, horizon_s * self.pace)


def paced(periods: Periods, pace: float) -> Periods:
    """Plans come as often in the load's time; clocks follow requests, which are as quick as ever."""
    return replace(
        periods,
        pool_s=periods.pool_s / pace,
        cluster_s=periods.cluster_s / pace,
        joint_s=periods.joint_s / pace,
    )

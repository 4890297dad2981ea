"""Grid: carbon intensity of electricity by hour of the day, so that a joule at noon is not a joule at night.

Means of 2022 by UTC hour, in g CO2/kWh, from the hourly generation mix of two US grid operators (HewlettPackard's dc-rl
at a92b4755, EIA figures). A workload that does not say when it began is taken to begin at 00:00 UTC.
"""

from dataclasses import dataclass

HOURS = 24
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid's mean day."""

    name: str
    g_per_kwh: tuple[float, ...]  # 24, by UTC hour

    def intensity(self, unix_s: float) -> float:
        """G CO2/kWh at a moment."""
        return self.g_per_kwh[int(unix_s // HOUR_S) % HOURS]


GRIDS: dict[str, Grid] = {
    "CISO": Grid(
        "CISO",
        (
            219.0,
            261.0,
            294.0,
            306.0,
            308.0,
            309.0,
            311.0,
            308.0,
            306.0,
            303.0,
            301.0,
            301.0,
            302.0,
            302.0,
            287.0,
            253.0,
            209.0,
            185.0,
            179.0,
            177.0,
            177.0,
            177.0,
            180.0,
            191.0,
        ),
    ),
    "ERCO": Grid(
        "ERCO",
        (
            372.0,
            387.0,
            386.0,
            375.0,
            360.0,
            346.0,
            333.0,
            325.0,
            322.0,
            323.0,
            327.0,
            335.0,
            346.0,
            354.0,
            347.0,
            336.0,
            334.0,
            338.0,
            343.0,
            346.0,
            348.0,
            347.0,
            348.0,
            354.0,
        ),
    ),
}

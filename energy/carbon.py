"""CarbonIntensity: grams of CO2 that one kWh causes on the grid a cluster hangs on, at a moment.

One contract, three sources: a number or a region's yearly mean (here), hours of a year (here, read by
``adapters/carbon_file.py``), live (``adapters/carbon_electricity_maps.py``). Times are Unix seconds. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from energy.carbon_regions import REGION_G_PER_KWH, SOURCE

HOUR_S = 3600.0
J_PER_KWH = 3.6e6


class CarbonError(ValueError):
    """A source of carbon intensity is wrong or away; the message names it and the fix."""


class CarbonIntensity(Protocol):
    """What a kWh causes, and who says so."""

    @property
    def source(self) -> str:
        """Where the numbers come from, for a report's foot."""

    def g_per_kwh(self, unix_s: float) -> float:
        """Grams of CO2 per kWh at that moment. Never fails: it answers with the best it knows."""


@dataclass(frozen=True, slots=True)
class StaticIntensity:
    """The same at every hour."""

    intensity_g_per_kwh: float
    source: str

    def g_per_kwh(self, unix_s: float) -> float:
        """The one value."""
        return self.intensity_g_per_kwh


def intensity_of_region(region: str) -> StaticIntensity:
    """The yearly mean of a cloud region's grid, as ``us-west1``. Raises ``CarbonError`` naming the known ones."""
    try:
        return StaticIntensity(REGION_G_PER_KWH[region], f"{region}: {SOURCE}")
    except KeyError:
        known = ", ".join(REGION_G_PER_KWH)
        raise CarbonError(f"no carbon intensity is known for region {region!r}; known: {known}") from None


@dataclass(frozen=True, slots=True)
class HourlyIntensity:
    """Consecutive hours, from ``begin_s`` on. Outside them, the same hours again: of a year, the same hour of the year.

    A series that is not whole weeks is repeated by its whole weeks, so that weekdays stay weekdays as far as it goes;
    one shorter than a week by its whole days, then by itself.
    """

    begin_s: float
    hourly_g_per_kwh: Sequence[float]
    source: str

    def __post_init__(self) -> None:
        if not len(self.hourly_g_per_kwh):
            raise CarbonError(f"{self.source}: there is not one hour in it")

    def g_per_kwh(self, unix_s: float) -> float:
        """The mean of that hour."""
        hour = int((unix_s - self.begin_s) // HOUR_S)
        hours = len(self.hourly_g_per_kwh)
        if not 0 <= hour < hours:
            period = next((hours // unit * unit for unit in (168, 24) if hours >= unit), hours)
            hour %= period
        return float(self.hourly_g_per_kwh[hour])


def co2_g(energy_j: float, g_per_kwh: float) -> float:
    """Grams of CO2 of that much energy."""
    return energy_j / J_PER_KWH * g_per_kwh

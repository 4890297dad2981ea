"""Live carbon intensity from Electricity Maps (API v3, ``carbon-intensity/latest``), by httpx.

``refresh`` asks; ``g_per_kwh`` answers from what was last heard, so that accounting never waits. Before the first
answer, and once the last is older than ``stale_s``, it answers from the fallback.
"""

import asyncio
import logging
from datetime import datetime

import httpx

from energy.carbon import CarbonError, CarbonIntensity

log = logging.getLogger("dynamollm.carbon")

URL = "https://api.electricitymaps.com"
REFRESH_S = 900.0  # the grid's figures change by the hour, and are published late


class ElectricityMapsIntensity:
    """One zone, as ``DE`` or ``US-CAL-CISO``, with the caller's token."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        zone: str,
        token: str,
        fallback: CarbonIntensity,
        url: str = URL,
        stale_s: float = 6 * 3600.0,
    ) -> None:
        self._client = client
        self._zone = zone
        self._token = token
        self._fallback = fallback
        self._url = url
        self._stale_s = stale_s
        self._heard: tuple[float, float] | None = None  # of when, g/kWh

    @property
    def source(self) -> str:
        """Electricity Maps and its zone."""
        return f"Electricity Maps, zone {self._zone}"

    def g_per_kwh(self, unix_s: float) -> float:
        """The last value heard, or the fallback's."""
        if self._heard is None or unix_s - self._heard[0] > self._stale_s:
            return self._fallback.g_per_kwh(unix_s)
        return self._heard[1]

    async def run(self) -> None:
        """Ask every ``REFRESH_S`` until cancelled; a failure is said, and the last answer or the fallback stays."""
        while True:
            try:
                await self.refresh()
            except CarbonError as error:
                log.warning("%s", error)
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Ask once. Raises ``CarbonError``; what was heard before stays. Call every ``REFRESH_S``."""
        try:
            answer = await self._client.get(
                f"{self._url}/v3/carbon-intensity/latest",
                params={"zone": self._zone},
                headers={"auth-token": self._token},
            )
        except httpx.HTTPError as error:
            raise CarbonError(f"{self.source}: {type(error).__name__}: {error}") from None
        if answer.status_code in (401, 403):
            raise CarbonError(f"{self.source}: the token is wrong, or not for this zone (status {answer.status_code})")
        if not answer.is_success:
            raise CarbonError(f"{self.source}: status {answer.status_code}")
        try:
            told = answer.json()
            self._heard = (datetime.fromisoformat(told["datetime"]).timestamp(), float(told["carbonIntensity"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CarbonError(f"{self.source}: the answer is not understood: {error!r}") from None

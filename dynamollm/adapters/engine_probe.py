"""HttpEngineProbe: an engine's load from its ``/metrics``, read line by line.

vLLM's page is 50 kB, of which four gauges are wanted; a full Prometheus parse of it takes milliseconds of the gateway's
loop, looking for four names takes microseconds.
"""

import re

import httpx

from pools.view import EngineLoad

_SAMPLE = rb"^vllm:%s(?:\{[^}\n]*\})? ([0-9.eE+-]+|NaN)$"
_RUNNING = re.compile(_SAMPLE % b"num_requests_running", re.MULTILINE)
_WAITING = re.compile(_SAMPLE % b"num_requests_waiting", re.MULTILINE)
_KV_USAGE = re.compile(_SAMPLE % b"kv_cache_usage_perc", re.MULTILINE)
_AWAKE = re.compile(rb'^vllm:engine_sleep_state\{[^}\n]*sleep_state="awake"[^}\n]*\} ([0-9.eE+-]+)$', re.MULTILINE)


class HttpEngineProbe:
    """Scrapes engines over HTTP; one client, connections kept."""

    def __init__(self, timeout_s: float = 2.0) -> None:
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False)

    async def load(self, url: str) -> EngineLoad:
        """Return the load at ``url``. Raises ``OSError`` if it does not answer or is no vLLM."""
        try:
            answer = await self._client.get(f"{url}/metrics")
        except httpx.HTTPError as error:
            raise OSError(f"{url}/metrics: {error!r}") from error
        if answer.status_code != httpx.codes.OK:
            raise OSError(f"{url}/metrics: status {answer.status_code}")
        return parse_load(answer.content, url)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def parse_load(page: bytes, url: str) -> EngineLoad:
    """Find the gauges in a metrics page; engines behind one server add up. Raises ``OSError`` if none is there."""
    running, waiting = _values(_RUNNING, page), _values(_WAITING, page)
    if not running or not waiting:
        raise OSError(f"{url}/metrics: no vllm:num_requests_running; is it a vLLM server?")
    return EngineLoad(
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        kv_cache_usage=max(_values(_KV_USAGE, page), default=0.0),
        awake=all(value > 0 for value in _values(_AWAKE, page)),  # a build without the gauge cannot sleep
    )


def _values(pattern: re.Pattern[bytes], page: bytes) -> list[float]:
    return [float(value) for value in pattern.findall(page)]

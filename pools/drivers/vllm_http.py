"""VllmServer: the few questions a driver asks one vLLM server. An answer to /health is not one of them.

A server answers /health with 200 while its weights load in some builds, while it sleeps, and while it drains; a request
then hangs or fails. A token is what proves that it serves.
"""

import asyncio
import contextlib

import httpx

from pools.drivers.port import DriverError

POLL_PERIOD_S = 0.1
TOKEN_TIMEOUT_S = 120.0  # the first one may wait for kernels to be compiled
CALL_TIMEOUT_S = 120.0  # weights move to host memory and back
SLEEP_TOLD_WITHIN_S = 10.0
WARM_UP_WORDS = 512


class VllmServer:
    """One server at ``url`` that serves ``model``."""

    def __init__(self, url: str, model: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        self._model = model
        # a connection a call: vLLM closes idle ones after 5 s, which looks like a failure of the call
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            base_url=url, limits=limits, trust_env=False, timeout=CALL_TIMEOUT_S, transport=transport
        )

    async def close(self) -> None:
        """Close what is open towards it."""
        await self._client.aclose()

    async def until_first_token(self) -> None:
        """Return once it has produced tokens, for a short prompt and then, as a warm-up, for a longer one.

        Raises ``DriverError`` if it refuses the request for good.
        """
        while True:
            if await self._gives_token("ready"):
                return await self._warm_up()
            await asyncio.sleep(POLL_PERIOD_S)

    async def _warm_up(self) -> None:
        try:
            await self._gives_token("ready " * WARM_UP_WORDS)
        except DriverError:
            return  # its context is shorter than that

    async def _gives_token(self, prompt: str) -> bool:
        body = {"model": self._model, "prompt": prompt, "max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
        try:
            answer = await self._client.post("/v1/completions", json=body, timeout=TOKEN_TIMEOUT_S)
        except httpx.HTTPError:
            return False  # no listener yet, or not for long
        if answer.is_client_error:
            raise DriverError(
                f"{self.url} refuses to complete {prompt[:10]!r}: {answer.status_code} {answer.text[:300]}"
            )
        return answer.is_success and answer.json()["usage"]["completion_tokens"] > 0

    async def until_idle(self) -> None:
        """Return once every answer has been sent to its end; never while it does not tell."""
        while True:
            with contextlib.suppress(DriverError):
                if (await self._call("GET", "/load")).json()["server_load"] == 0:
                    return
            await asyncio.sleep(POLL_PERIOD_S)

    async def sleep(self) -> None:
        """Put the engine to sleep, weights in host memory. Raises ``DriverError`` if this build cannot."""
        await self._call("POST", "/sleep?level=1")

    async def sleeps(self) -> bool:
        """Whether the engine is asleep; one that does not tell is not."""
        try:
            return bool((await self._call("GET", "/is_sleeping", SLEEP_TOLD_WITHIN_S)).json()["is_sleeping"])
        except (DriverError, ValueError, KeyError):
            return False

    async def wake(self) -> None:
        """Wake the engine; returns when it has produced a token."""
        await self._call("POST", "/wake_up")
        await self.until_first_token()

    async def _call(self, method: str, path: str, within_s: float = CALL_TIMEOUT_S) -> httpx.Response:
        try:
            answer = await self._client.request(method, path, timeout=within_s)
        except httpx.HTTPError as error:
            raise DriverError(f"{self.url}{path}: {error!r}") from None
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise DriverError(f"{self.url} has no {path}: it cannot sleep; start it with VLLM_SERVER_DEV_MODE=1")
        if not answer.is_success:
            raise DriverError(f"{self.url}{path}: status {answer.status_code}: {answer.text[:300]}")
        return answer

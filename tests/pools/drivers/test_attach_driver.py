"""The attach driver: servers of others, taken as they are."""

import asyncio
import json

import httpx
import pytest

from pools.drivers.attach import AttachDriver
from pools.drivers.port import DriverError, InstanceSpec, StartRefusedError, UnknownInstanceError
from pools.drivers.vllm_http import POLL_PERIOD_S
from pools.instances import GpuSlot, InstanceShape, InstanceState
from simulator.virtual_loop import run


def spec(name: str, pool: str = "LL") -> InstanceSpec:
    return InstanceSpec(name, pool, InstanceShape("m", "H100-SXM", 1), (GpuSlot("n", 0),), 1980)


def driver(status: list[int]) -> AttachDriver:
    """Servers whose requests end with these statuses, one after the other; 0 is no answer at all."""

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/completions"
        assert json.loads(request.content)["model"] == "m"
        code = status.pop(0) if len(status) > 1 else status[0]
        if code == 0:
            raise httpx.ConnectError("refused")
        return httpx.Response(code, json={"usage": {"completion_tokens": 2}})

    urls = {"LL": ["http://a:1", "http://b:2"]}
    return AttachDriver(urls, transport=httpx.MockTransport(answer))


def test_a_server_is_ready_once_it_has_given_a_token():
    async def main() -> None:
        attached = driver([0, 503, 200])
        events = attached.events()
        instance = await attached.start(spec("ll-1"))
        assert (instance.url, instance.state) == ("http://a:1", InstanceState.STARTING)
        states = [(await anext(events)).state for _ in range(2)]
        assert states == [InstanceState.STARTING, InstanceState.READY]
        assert asyncio.get_running_loop().time() == pytest.approx(2 * POLL_PERIOD_S)
        assert [i.state for i in await attached.list()] == [InstanceState.READY]
        await attached.close()

    run(main())


def test_a_server_of_another_model_fails_with_its_answer_and_its_url_is_free_again():
    async def main() -> None:
        attached = driver([404, 200])
        events = attached.events()
        await attached.start(spec("ll-1"))
        seen = [await anext(events) for _ in range(2)]
        assert [event.state for event in seen] == [InstanceState.STARTING, InstanceState.FAILED]
        assert "http://a:1 refuses to complete" in seen[1].reason
        assert await attached.list() == ()
        await attached.stop("ll-1", 0.0)  # what is gone may be stopped
        urls = [(await attached.start(spec(name))).url for name in ("ll-2", "ll-3")]
        assert sorted(urls) == ["http://a:1", "http://b:2"]
        await attached.close()

    run(main())


def test_one_that_is_still_awaited_can_be_let_go():
    async def main() -> None:
        attached = driver([0])
        await attached.start(spec("ll-1"))
        await asyncio.sleep(1.0)
        await attached.stop("ll-1", 0.0)
        assert await attached.list() == ()
        await attached.close()

    run(main())


def test_a_pool_has_as_many_instances_as_urls_and_a_url_comes_back():
    async def main() -> None:
        attached = driver([200])
        await attached.start(spec("ll-1"))
        await attached.start(spec("ll-2"))
        with pytest.raises(StartRefusedError, match="no further URL"):
            await attached.start(spec("ll-3"))
        with pytest.raises(StartRefusedError, match="pool SS"):
            await attached.start(spec("ss-1", "SS"))
        with pytest.raises(DriverError, match="runs already"):
            await attached.start(spec("ll-2"))
        await attached.stop("ll-1", 0.0)
        await attached.stop("ll-1", 0.0)
        assert (await attached.start(spec("ll-3"))).url == "http://a:1"
        await attached.close()
        assert await attached.list() == ()

    run(main())


def test_what_belongs_to_others_is_not_touched():
    async def main() -> None:
        attached = driver([200])
        await attached.start(spec("ll-1"))
        with pytest.raises(DriverError, match="not this gateway's to set"):
            await attached.set_sm_clock("ll-1", 1200)
        with pytest.raises(DriverError, match="cannot be parked"):
            await attached.park("ll-1")
        await attached.wake("ll-1")
        with pytest.raises(UnknownInstanceError):
            await attached.wake("ll-2")
        await attached.close()

    run(main())

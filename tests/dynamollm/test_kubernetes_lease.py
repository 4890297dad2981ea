"""Leadership by a Lease: the terms and epochs of every store's, against an API server in memory."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pools" / "drivers"))

from kubernetes_examples import NAMESPACE, Cluster, kubernetes_cluster

from dynamollm.adapters.kubernetes_lease import KubernetesLease
from pools.drivers.kubernetes_api import KubernetesApi

Take = Callable[[str], KubernetesLease]


def play(scenario: Callable[[Cluster, Take, list[float]], Awaitable[None]]) -> None:
    async def main() -> None:
        now_s = [100.0]
        async with kubernetes_cluster(()) as cluster:
            apis: list[KubernetesApi] = []

            def take(name: str = "controller") -> KubernetesLease:
                apis.append(KubernetesApi(NAMESPACE, url=cluster.url))
                return KubernetesLease(apis[-1], name, lambda: now_s[0], lambda: now_s[0])

            try:
                await scenario(cluster, take, now_s)
            finally:
                for api in apis:
                    await api.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_one_holds_it_until_it_lapses_and_the_epoch_rises_with_the_next():
    async def scenario(cluster, take, now_s) -> None:
        one, other = take("l"), take("l")
        assert await one.hold("a", 2.0, 0, 0) == 1
        assert await other.hold("b", 2.0, 0, 0) is None
        assert await one.hold("a", 2.0, 1, 1) == 1  # renewed: the same term
        now_s[0] += 1.9
        assert await other.hold("b", 2.0, 0, 0) is None
        now_s[0] += 2.0
        assert await other.hold("b", 2.0, 0, 0) == 2
        assert await one.hold("a", 2.0, 1, 1) is None
        spec = (await cluster.api.get("leases", "l"))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 2)
        assert spec["acquireTime"] == spec["renewTime"] == "1970-01-01T00:01:43.900000Z"

    play(scenario)


def test_given_up_it_is_free_at_once_and_only_its_holder_gives_it_up():
    async def scenario(cluster, take, now_s) -> None:
        one, other = take("l"), take("l")
        assert await one.hold("a", 30.0, 0, 0) == 1
        await other.release("b")
        assert await other.hold("b", 30.0, 0, 0) is None
        await one.release("a")
        assert await other.hold("b", 30.0, 0, 0) == 2
        await take("other").release("a")  # there is none of that name

    play(scenario)


def test_a_term_goes_on_where_nobody_else_has_led():
    async def scenario(cluster, take, now_s) -> None:
        one, other = take("l"), take("l")
        assert await one.hold("a", 1.0, 0, 0) == 1
        now_s[0] += 60.0
        assert await one.hold("a", 1.0, 1, 1) == 1
        assert await other.hold("a", 1.0, 0, 0) == 2  # restarted under the same name: another term
        assert await one.hold("a", 1.0, 1, 1) == 3
        await cluster.api.delete("leases", "l")  # the server has lost it
        assert await one.hold("a", 1.0, 3, 3) == 3
        await cluster.api.delete("leases", "l")
        assert await other.hold("b", 1.0, 0, 3) == 4

    play(scenario)


def test_of_two_that_take_a_lapsed_lease_the_server_lets_one_have_it():
    async def scenario(cluster, take, now_s) -> None:
        lapsed, others = take("l"), [take("l") for _ in range(4)]
        assert await lapsed.hold("old", 1.0, 0, 0) == 1
        assert [await lease.hold(f"new-{n}", 5.0, 0, 0) for n, lease in enumerate(others)] == [None] * 4
        now_s[0] += 5.0
        terms = await asyncio.gather(*(lease.hold(f"new-{n}", 5.0, 0, 0) for n, lease in enumerate(others)))
        assert sorted(term for term in terms if term is not None) == [2]

    play(scenario)


def test_a_server_that_is_away_or_refuses_is_an_os_error():
    async def scenario(cluster, take, now_s) -> None:
        lease = take("l")
        cluster.server.refuse("POST", "/leases$", 403)
        with pytest.raises(OSError, match="403"):
            await lease.hold("a", 1.0, 0, 0)
        assert await lease.hold("a", 1.0, 0, 0) == 1
        cluster.server.refuse("PUT", "/leases/l$", 409)
        assert await lease.hold("a", 1.0, 1, 1) is None

    play(scenario)

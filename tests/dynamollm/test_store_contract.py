"""One contract, every store: in memory, in a file, in a real Redis; each also as two processes see it."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_marks import needs_redis

from benchmarks.adapters.redis_server import BINARY, RedisServer
from dynamollm.adapters.redis_store import RedisStore
from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.store import NEVER, Store

Open = Callable[[], Store]
KINDS = ["memory", "file", pytest.param("redis", marks=needs_redis)]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer | None]:
    if BINARY is None:
        yield None
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=KINDS)
def open_store(request: Any, tmp_path: Path, redis_server: RedisServer | None) -> Open:
    """Opens the same store again and again, as its processes would; in memory there is one process and one store."""
    match request.param:
        case "redis":
            assert redis_server is not None
            return lambda: RedisStore(redis_server.url, prefix=tmp_path.name)
        case "file":
            return lambda: SqliteStore(tmp_path / "state" / "deep")
        case _:
            only = SqliteStore()
            return lambda: only


def run(open_store: Open, check: Callable[[Store, Store], Any]) -> None:
    """Run a check with two stores that are one."""

    async def main() -> None:
        one = open_store()
        other = open_store()
        try:
            async with asyncio.timeout(20):
                await check(one, other)
        finally:
            await one.close()
            await other.close()

    asyncio.run(main())


# --- documents -----------------------------------------------------------------------------------------------------


def test_a_document_comes_back_and_a_missing_one_is_none(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.read("lengths") is None
        await one.write("lengths", {"a": [1, 2.5, None, "x"], "b": {}})
        await one.write("lengths", {"a": [1, 2.5]})
        await one.write("tokens", {"ü": True})
        assert await other.read("lengths") == {"a": [1, 2.5]}
        assert await other.read("tokens") == {"ü": True}

    run(open_store, check)


# --- what is published ---------------------------------------------------------------------------------------------


def test_what_is_published_is_seen_once_by_who_looks_for_something_newer(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await other.published("cluster") is None
        assert await one.publish("cluster", {"n": 1}, (1, 1))
        found = await other.published("cluster")
        assert found == ((1, 1), {"n": 1})
        assert await other.published("cluster", after=(1, 1)) is None
        assert await one.publish("cluster", {"n": 2}, (1, 2))
        assert await other.published("cluster", after=(1, 1)) == ((1, 2), {"n": 2})

    run(open_store, check)


def test_a_leader_of_before_cannot_overwrite_what_its_successor_published(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.publish("cluster", {"by": "old"}, (1, 900))
        assert await other.publish("cluster", {"by": "new"}, (2, 1))
        assert not await one.publish("cluster", {"by": "old"}, (1, 901))
        assert not await other.publish("cluster", {"by": "new, but late"}, (2, 0))
        assert await one.published("cluster") == ((2, 1), {"by": "new"})

    run(open_store, check)


stamps = st.tuples(st.integers(0, 3), st.integers(0, 12))  # 12 > 9: compared as numbers, not as text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(stamps, max_size=8), after=stamps)
def test_whatever_the_order_the_highest_stamp_stands(open_store, order, after):
    name = str(uuid.uuid4())

    async def check(one: Store, other: Store) -> None:
        standing = NEVER
        for stamp in order:
            taken = await one.publish(name, {"stamp": list(stamp)}, stamp)
            assert taken == (stamp >= standing)
            standing = max(standing, stamp)
        found = await other.published(name, after)
        assert (found is not None) == (standing > after)
        if found is not None:
            assert found == (standing, {"stamp": list(standing)})

    run(open_store, check)


def test_a_nudge_ends_the_wait_and_without_one_the_time_does(open_store):
    async def check(one: Store, other: Store) -> None:
        await other.nudged(0.3)  # a listener may only begin to listen now
        waiting = asyncio.create_task(other.nudged(5.0))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await one.publish("cluster", {}, (1, 1))
        if isinstance(one, SqliteStore) and one is not other:
            waiting.cancel()  # another process is only seen by looking
        else:
            async with asyncio.timeout(2.0):
                await waiting
        began = asyncio.get_running_loop().time()
        await other.nudged(0.05)
        assert 0.04 < asyncio.get_running_loop().time() - began < 2.0

    run(open_store, check)


# --- reports -------------------------------------------------------------------------------------------------------


def test_reports_are_seen_by_all_of_their_group_and_lapse_when_nobody_renews_them(open_store):
    async def check(one: Store, other: Store) -> None:
        await one.report("gateways", "a", {"load": 1}, ttl_s=30.0)
        await one.report("gateways", "b", {"load": 2}, ttl_s=0.2)
        await one.report("others", "a", {"load": 3}, ttl_s=30.0)
        await one.report("gateways", "a", {"load": 4}, ttl_s=30.0)
        assert await other.reports("gateways") == {"a": {"load": 4}, "b": {"load": 2}}
        await asyncio.sleep(0.3)
        assert await other.reports("gateways") == {"a": {"load": 4}}
        await other.report("gateways", "b", {"load": 5}, ttl_s=30.0)
        assert await one.reports("gateways") == {"a": {"load": 4}, "b": {"load": 5}}
        assert await one.reports("nobody") == {}

    run(open_store, check)


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_in_order_from_where_one_was(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await other.entries("ledger") == []
        await one.append("ledger", [{"n": 1}, {"n": 2}], most=1000)
        await other.append("ledger", [{"n": 3}], most=1000)
        await one.append("load", [{"x": 1}], most=1000)
        first = await one.entries("ledger", most=2)
        assert [entry for _, entry in first] == [{"n": 1}, {"n": 2}]
        rest = await other.entries("ledger", after=first[-1][0])
        assert [entry for _, entry in rest] == [{"n": 3}]
        assert await other.entries("ledger", after=rest[-1][0]) == []

    run(open_store, check)


def test_a_stream_keeps_about_the_last_so_many(open_store):
    async def check(one: Store, other: Store) -> None:
        for n in range(0, 1000, 50):
            await one.append("ledger", [{"n": k} for k in range(n, n + 50)], most=100)
        await one.append("load", [{"x": 1}], most=10)
        kept = [entry["n"] for _, entry in await other.entries("ledger")]
        assert kept == list(range(kept[0], 1000))
        assert 100 <= len(kept) < 400  # Redis trims by whole nodes of a hundred
        assert len(await other.entries("load")) == 1

    run(open_store, check)


# --- the lease -----------------------------------------------------------------------------------------------------


def test_one_holds_the_lease_until_it_lapses_and_the_epoch_rises_with_the_next(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.hold("a", 0.2, 0, 0) == 1
        assert await other.hold("b", 0.2, 0, 0) is None
        assert await one.hold("a", 0.2, 1, 1) == 1  # renewed: the same term
        await asyncio.sleep(0.3)
        assert await other.hold("b", 30.0, 0, 0) == 2
        assert await one.hold("a", 30.0, 1, 1) is None

    run(open_store, check)


def test_a_lease_given_up_is_free_at_once_and_only_its_holder_gives_it_up(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.hold("a", 30.0, 0, 0) == 1
        await other.release("b")
        assert await other.hold("b", 30.0, 0, 0) is None
        await one.release("a")
        assert await other.hold("b", 30.0, 0, 0) == 2

    run(open_store, check)


def test_a_leader_whom_nobody_followed_goes_on_in_its_epoch(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.hold("a", 0.1, 0, 0) == 1
        await asyncio.sleep(0.2)
        assert await one.hold("a", 30.0, 1, 1) == 1

    run(open_store, check)


def test_a_holder_that_has_forgotten_its_term_begins_another(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.hold("a", 30.0, 0, 0) == 1
        assert await other.hold("a", 30.0, 0, 0) == 2  # restarted under the same name
        assert await one.hold("a", 30.0, 1, 1) == 3  # the one of before is not the leader of epoch 2

    run(open_store, check)


def test_a_store_that_has_forgotten_everything_goes_on_above_what_was_seen(open_store):
    async def check(one: Store, other: Store) -> None:
        assert await one.hold("leader", 0.1, 7, 7) == 7  # it led in 7: it still does
        await asyncio.sleep(0.2)
        assert await other.hold("standby", 30.0, 0, 7) == 8  # it had only heard of 7

    run(open_store, check)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans()), max_size=12), st.integers(0, 20))
def test_no_two_holders_ever_have_one_epoch(open_store, calls, begin):
    async def check(one: Store, other: Store) -> None:
        mine: dict[str, int] = {}
        owner: dict[int, str] = {}
        highest = begin
        for holder, seen, gives_up in calls:
            term = await one.hold(holder, 30.0, mine.get(holder, 0), max(seen, begin))
            if term is None:
                mine.pop(holder, None)
                continue
            assert owner.setdefault(term, holder) == holder
            assert term >= highest
            highest = max(highest, term)
            mine[holder] = term
            if gives_up:
                await other.release(holder)
        for holder in "abc":
            await other.release(holder)

    run(open_store, check)


# --- a store that is away --------------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path):
    (tmp_path / "dynamollm.sqlite").write_text("not a database, whatever its name says")
    with pytest.raises(OSError, match=str(tmp_path)):
        asyncio.run(SqliteStore(tmp_path).read("x"))


@needs_redis
def test_a_redis_that_is_killed_is_an_error_at_once_and_comes_back_by_itself(tmp_path):
    server = RedisServer(tmp_path)

    async def main() -> None:
        store = RedisStore(server.url.replace("redis://", "redis://:secret@").replace(":secret@", ""))
        loop = asyncio.get_running_loop()
        try:
            await store.write("x", {"n": 1})
            await store.nudged(0.2)
            server.kill()
            began = loop.time()
            for call in (
                store.read("x"),
                store.hold("a", 1.0, 0, 0),
                store.entries("s"),
                store.report("g", "m", {}, 1),
            ):
                with pytest.raises(OSError, match=f"127.0.0.1:{server.port}"):
                    await call
            await store.nudged(0.1)  # waits, and says nothing
            assert loop.time() - began < 5.0
            server.start()
            assert await store.read("x") is None  # it was killed: it has nothing
            await store.write("x", {"n": 2})
            assert await store.read("x") == {"n": 2}
            await asyncio.sleep(1.5)  # subscribed again by then
            waiting = asyncio.create_task(store.nudged(5.0))
            await asyncio.sleep(0.05)
            await store.publish("cluster", {}, (1, 1))
            async with asyncio.timeout(2.0):
                await waiting
        finally:
            await store.close()

    try:
        asyncio.run(main())
    finally:
        server.stop()


@needs_redis
def test_deployments_that_share_a_server_do_not_see_each_other(redis_server):
    async def main() -> None:
        one, other = RedisStore(redis_server.url, "one"), RedisStore(redis_server.url, "other")
        await one.write("x", {"n": 1})
        assert await other.read("x") is None
        assert await one.hold("a", 5.0, 0, 0) == await other.hold("b", 5.0, 0, 0)
        await one.close()
        await other.close()

    asyncio.run(main())

"""What is learned outlives the process, and a broken store costs the memory only."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.persistence import Persistence
from dynamollm.store import Document
from energy.accounting import Prices
from energy.accounting_ledger import EnergyLedger
from energy.carbon import StaticIntensity
from pools.learned_lengths import LearnedLengths
from pools.lengths import LengthFeatures
from pools.tokens import PromptSize, TokenEstimator
from simulator.virtual_loop import run


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def snapshot(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, snapshot: dict[str, Any]) -> None:
        if "count" not in snapshot:
            raise ValueError("no count")
        self.count = snapshot["count"]


def test_the_predictors_and_the_ledger_come_back_as_they_were():
    store = SqliteStore()
    tokens, lengths = TokenEstimator(), LearnedLengths()
    ledger = EnergyLedger(StaticIntensity(100.0, "test"), Prices(), 0.0)
    features = LengthFeatures("m", 100, tools=True)
    for _ in range(50):
        tokens.learn("m", PromptSize(400, 1), 160)
        lengths.learn(features, 37)
    asyncio.run(Persistence(store, {"tokens": tokens, "lengths": lengths, "ledger": ledger}).save())
    again, again_lengths = TokenEstimator(), LearnedLengths()
    asyncio.run(Persistence(store, {"tokens": again, "lengths": again_lengths}).restore())
    assert again.estimate("m", PromptSize(400, 1)) == tokens.estimate("m", PromptSize(400, 1))
    assert tuple(again_lengths.predict(features)) == pytest.approx(tuple(lengths.predict(features)), rel=0.2)


def test_it_saves_every_minute_and_at_the_end():
    store, counter = SqliteStore(), Counter()

    async def main() -> None:
        task = asyncio.create_task(Persistence(store, {"c": counter}).run())
        counter.count = 1
        await asyncio.sleep(59)
        assert await store.read("c") is None
        await asyncio.sleep(2)
        assert await store.read("c") == {"count": 1}
        counter.count = 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.read("c") == {"count": 2}

    run(main())


def test_what_cannot_be_used_is_said_and_begun_anew(caplog):
    async def main() -> dict[str, int]:
        store = SqliteStore()
        await store.write("other", {"kount": 1})
        await store.write("good", {"count": 7})
        parts = {name: Counter() for name in ("other", "good", "new")}
        await Persistence(store, parts).restore()
        return {name: part.count for name, part in parts.items()}

    assert asyncio.run(main()) == {"other": 0, "good": 7, "new": 0}
    assert "other cannot be used" in caplog.text


class AwayStore(SqliteStore):
    async def read(self, name: str) -> Document | None:
        raise OSError("No route to host")

    async def write(self, name: str, document: Mapping[str, Any]) -> None:
        raise OSError("No space left on device")


def test_a_store_that_is_away_is_said_and_costs_the_memory_only(caplog):
    counter = Counter(2)

    async def main() -> None:
        persistence = Persistence(AwayStore(), {"c": counter})
        await persistence.restore()
        await persistence.save()

    asyncio.run(main())
    assert counter.count == 2
    assert "No route to host" in caplog.text
    assert "No space left" in caplog.text

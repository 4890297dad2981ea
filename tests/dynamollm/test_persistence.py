"""What is learned outlives the process, and a broken store costs the memory only."""

import asyncio
from typing import Any

import pytest

from dynamollm.adapters.file_store import FileStore
from dynamollm.persistence import MemoryStore, Persistence
from energy.accounting import Prices
from energy.accounting_ledger import EnergyLedger
from energy.carbon import StaticIntensity
from pools.lengths import LengthFeatures, RunningLengths
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


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "state" / "deep")


def test_a_document_comes_back_and_a_missing_one_is_none(store):
    assert store.read("lengths") is None
    store.write("lengths", {"a": [1, 2.5, None, "x"]})
    store.write("lengths", {"a": [1, 2.5]})
    assert store.read("lengths") == {"a": [1, 2.5]}


def test_the_predictors_and_the_ledger_come_back_as_they_were(store):
    tokens, lengths = TokenEstimator(), RunningLengths()
    ledger = EnergyLedger(StaticIntensity(100.0, "test"), Prices(), 0.0)
    features = LengthFeatures("m", 100, tools=True)
    for _ in range(50):
        tokens.learn("m", PromptSize(400, 1), 160)
        lengths.learn(features, 37)
    Persistence(store, {"tokens": tokens, "lengths": lengths, "ledger": ledger}).save()
    again, again_lengths = TokenEstimator(), RunningLengths()
    Persistence(store, {"tokens": again, "lengths": again_lengths}).restore()
    assert again.estimate("m", PromptSize(400, 1)) == tokens.estimate("m", PromptSize(400, 1))
    assert again_lengths.predict(features) == pytest.approx(lengths.predict(features))


def test_it_saves_every_minute_and_at_the_end():
    store, counter = MemoryStore(), Counter()

    async def main() -> None:
        task = asyncio.create_task(Persistence(store, {"c": counter}).run())
        counter.count = 1
        await asyncio.sleep(59)
        assert store.documents == {}
        await asyncio.sleep(2)
        assert store.documents == {"c": {"count": 1}}
        counter.count = 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert store.documents == {"c": {"count": 2}}


def test_what_cannot_be_used_is_said_and_begun_anew(tmp_path, caplog):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text('{"kount": 1}')
    (folder / "good.json").write_text('{"count": 7}')
    parts = {name: Counter() for name in ("broken", "other", "good", "new")}
    Persistence(FileStore(folder), parts).restore()
    assert {name: part.count for name, part in parts.items()} == {"broken": 0, "other": 0, "good": 7, "new": 0}
    assert "broken cannot be used" in caplog.text
    assert "other cannot be used" in caplog.text


def test_a_full_disk_is_said_and_leaves_the_old_document(tmp_path, caplog, monkeypatch):
    store = FileStore(tmp_path)
    store.write("c", {"count": 1})

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("energy.adapters.catalogue.os.replace", full)
    Persistence(store, {"c": Counter(2)}).save()
    assert "No space left" in caplog.text
    assert store.read("c") == {"count": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]

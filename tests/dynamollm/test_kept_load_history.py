"""Past demand: nothing of it is lost on the way through the store, what is old is coarser, what is too old is gone."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.kept_load import KeptLoad
from dynamollm.load_history import FINE_S, KEPT_S, SLOT_S, WRITTEN_S, LoadHistory
from dynamollm.reports import LOAD
from simulator.virtual_loop import run
from solver.control import Demand

CLASSES = 9
BEGIN_S = 1_700_000_100.0


def demand(requests: float, window_s: float = 5.0, classes: int = CLASSES) -> Demand:
    column = np.zeros(classes)
    column[0] = requests
    return Demand(window_s, column, 100.0 * column, 50.0 * column, np.zeros(classes))


def total(history: LoadHistory) -> float:
    return sum(float(window.demand.requests.sum()) for window in history.windows)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=200))
def test_what_is_written_and_read_is_all_that_came(counts):
    leader, standby, stream = LoadHistory(), LoadHistory(), []
    for n, count in enumerate(counts):
        leader.add(BEGIN_S + 5.0 * (n + 1), demand(float(count)))
        stream += leader.to_write()
    assert all(entry["window_s"] >= WRITTEN_S for entry in stream)
    standby.read(stream, CLASSES)
    written = len(stream) * round(WRITTEN_S / 5.0)
    assert total(standby) == sum(counts[:written])
    assert total(leader) == sum(counts)
    assert standby.to_write() == []


def test_the_last_hour_is_as_it_was_observed_and_older_time_in_slots():
    history = LoadHistory()
    for n in range(round(3 * FINE_S / 5.0)):
        history.add(BEGIN_S + 5.0 * (n + 1), demand(1.0))
    spans = [window.demand.window_s for window in history.windows]
    assert sum(spans) == pytest.approx(3 * FINE_S)
    assert total(history) == 3 * FINE_S / 5.0
    assert max(spans) == SLOT_S
    assert len(spans) <= FINE_S / 5.0 + 2 * FINE_S / SLOT_S + 3
    until = [window.until_unix_s for window in history.windows]
    assert until == sorted(until)


def test_what_is_older_than_four_weeks_is_gone():
    history = LoadHistory()
    for n in range(35):
        history.add(BEGIN_S + 86_400.0 * n, demand(1.0, 86_400.0))
    assert history.windows[0].until_unix_s >= history.windows[-1].until_unix_s - KEPT_S


def test_a_standby_keeps_what_it_saw_and_writes_none_of_it():
    history = LoadHistory()
    history.add(BEGIN_S, demand(7.0, 600.0))
    history.forget_unwritten()
    assert history.to_write() == []
    assert total(history) == 7.0


def test_what_is_of_another_configuration_is_left_out_and_what_is_no_window_refused():
    writer, history = LoadHistory(), LoadHistory()
    writer.add(BEGIN_S, demand(7.0, 600.0, classes=18))
    history.read(writer.to_write(), CLASSES)
    assert history.windows == ()
    with pytest.raises(ValueError, match="no window"):
        history.read([{"until": 1.0}], CLASSES)


class Away(SqliteStore):
    """A store that cannot be reached while it is ``away``."""

    away = False

    async def append(self, stream, entries, most):
        if self.away:
            raise OSError("away")
        await super().append(stream, entries, most)

    async def entries(self, stream, after="", most=1000):
        if self.away:
            raise OSError("away")
        return await super().entries(stream, after, most)


def windows_of(store) -> list[float]:
    async def read() -> list[float]:
        return [entry["window_s"] for _, entry in await store.entries(LOAD)]

    return run(read())


async def observing(history: LoadHistory, seconds: float) -> None:
    for n in range(round(seconds / 5.0)):
        await asyncio.sleep(5.0)
        history.add(BEGIN_S + 5.0 * (n + 1), demand(1.0))


def test_a_minute_at_a_time_is_kept_and_at_the_end_what_is_left():
    store, history = SqliteStore(), LoadHistory()

    async def main() -> None:
        task = asyncio.create_task(KeptLoad(store, history, CLASSES).run())
        await observing(history, 150.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main())
    spans = windows_of(store)
    assert sum(spans) == 150.0
    assert all(60.0 <= span <= 65.0 for span in spans[:-1])
    assert spans[-1] < 60.0


def test_who_begins_knows_what_one_before_has_kept_and_writes_none_of_it_again():
    store = SqliteStore()

    async def one_after_the_other() -> LoadHistory:
        history = LoadHistory()
        kept = KeptLoad(store, history, CLASSES)
        await kept.restore()
        before = len(history.windows)
        await observing(history, 60.0)
        await kept.save()
        again = LoadHistory()
        await KeptLoad(store, again, CLASSES).restore()
        assert total(again) == total(history)
        assert len(again.windows) == before + 1
        return again

    run(one_after_the_other())
    assert total(run(one_after_the_other())) == 24.0
    assert windows_of(store) == [60.0, 60.0]


def test_a_store_that_is_away_costs_the_memory_and_never_the_service(caplog):
    store, history = Away(), LoadHistory()
    store.away = True

    async def main() -> None:
        kept = KeptLoad(store, history, CLASSES)
        await kept.restore()
        task = asyncio.create_task(kept.run())
        await observing(history, 70.0)
        store.away = False
        await observing(history, 70.0)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main())
    assert "learned anew" in caplog.text
    assert "cannot be kept" in caplog.text
    assert sum(windows_of(store)) >= 70.0


def test_a_stream_that_somebody_spoilt_is_learned_anew(caplog):
    store, history = SqliteStore(), LoadHistory()

    async def main() -> None:
        await store.append(LOAD, [{"until": 1.0}], 10)
        await KeptLoad(store, history, CLASSES).restore()

    run(main())
    assert history.windows == ()
    assert "no window" in caplog.text

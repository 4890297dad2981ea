"""LeaseTable: what is written, what waits, what lapses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.gpu import ClockDwellError, ClockLock
from energy.leases import LeaseTable

SLOW, FAST = ClockLock(900, 900), ClockLock(1800, 1800)


def test_a_lock_that_is_in_force_is_not_written_again_but_its_lease_begins_anew():
    table = LeaseTable(ttl_s=10.0, dwell_s=1.0)
    assert table.must_write("a", SLOW, 0.0)
    table.hold("a", SLOW, "plan", 0.0)
    assert not table.must_write("a", SLOW, 5.0)
    table.hold("a", SLOW, "plan", 5.0)
    assert table.lapsed(14.9) == ()
    assert table.lapsed(15.0) == ("a",)


def test_raising_never_waits_and_lowering_waits_for_the_dwell():
    table = LeaseTable(ttl_s=10.0, dwell_s=2.0)
    table.hold("a", SLOW, "plan", 0.0)
    assert table.must_write("a", FAST, 0.1)
    table.hold("a", FAST, "plan", 0.1)
    with pytest.raises(ClockDwellError, match=r"GPU a: .*every 2 s; ask again in 1\.500 s") as caught:
        table.must_write("a", SLOW, 0.6)
    assert caught.value.retry_after_s == pytest.approx(1.5)
    assert table.must_write("a", SLOW, 2.1)


def test_a_reset_counts_as_a_change():
    table = LeaseTable(ttl_s=10.0, dwell_s=2.0)
    table.hold("a", SLOW, "plan", 0.0)
    table.release("a", 5.0)
    with pytest.raises(ClockDwellError):
        table.must_write("a", SLOW, 6.0)
    assert table.must_write("a", SLOW, 7.0)


def test_only_the_holder_renews_and_only_while_it_holds():
    table = LeaseTable(ttl_s=10.0, dwell_s=0.0)
    table.hold("a", SLOW, "old", 0.0)
    table.hold("b", SLOW, "old", 0.0)
    table.hold("a", FAST, "new", 1.0)
    assert set(table.renew(("a", "b", "c"), "old", 2.0)) == {"b"}
    assert table.leases["b"].expires_s == 12.0
    assert table.renew(("b",), "old", 12.0) == {}
    assert table.must_write("b", SLOW, 12.0), "a lapsed lock may be reset at any moment: it is written again"


def test_a_client_may_ask_for_a_shorter_lease_but_not_a_longer():
    table = LeaseTable(ttl_s=10.0, dwell_s=0.0)
    table.hold("a", SLOW, "plan", 0.0, ttl_s=3.0)
    table.hold("b", SLOW, "plan", 0.0, ttl_s=60.0)
    assert (table.leases["a"].expires_s, table.leases["b"].expires_s) == (3.0, 10.0)
    assert table.renew(("a",), "plan", 1.0)["a"].expires_s == 4.0


EVENTS = st.lists(
    st.tuples(
        st.floats(0.0, 5.0),  # time passes
        st.sampled_from(("lock", "renew", "reset", "tick")),
        st.sampled_from(("a", "b")),
        st.sampled_from((600, 1200, 1800)),
        st.sampled_from(("one", "two")),
    ),
    max_size=40,
)


@given(EVENTS)
def test_no_gpu_stays_locked_longer_than_the_ttl_after_its_holder_was_last_heard(events):
    ttl_s, now_s = 4.0, 0.0
    table = LeaseTable(ttl_s, dwell_s=1.0)
    board: dict[str, ClockLock] = {}  # what is really set
    heard_s: dict[str, float] = {}
    for passed_s, kind, gpu, clock_mhz, holder in [*events, (ttl_s, "tick", "a", 600, "one")]:
        now_s += passed_s
        if kind == "lock":
            lock = ClockLock(clock_mhz, clock_mhz)
            try:
                write = table.must_write(gpu, lock, now_s)
            except ClockDwellError:
                continue
            assert write or board[gpu] == lock, "what is not written is in force"
            board[gpu] = lock
            table.hold(gpu, lock, holder, now_s)
            heard_s[gpu] = now_s
        elif kind == "renew":
            for renewed in table.renew((gpu,), holder, now_s):
                heard_s[renewed] = now_s
        elif kind == "reset":
            board.pop(gpu, None)
            table.release(gpu, now_s)
        else:
            for lapsed in table.lapsed(now_s):
                del board[lapsed]
                table.release(lapsed, now_s)
            assert all(now_s - heard_s[gpu] < ttl_s for gpu in board)
        assert set(table.leases) == set(board)
    assert board == {}

"""Outlier ejection: consecutive failures, a cap on the share, back-off, probing."""

from hypothesis import given
from hypothesis import strategies as st

from pools.outliers import EjectionLimits, Outliers

LIMITS = EjectionLimits(consecutive_failures=3, max_share=0.5, base_s=5.0, max_s=40.0)


def fail(outliers, times=1, now_s=0.0, size=4, ejected=0):
    return [outliers.failed("a", now_s, size, ejected) for _ in range(times)]


def test_ejects_after_failures_in_a_row():
    outliers = Outliers(LIMITS)
    assert fail(outliers, 3) == [False, False, True]
    assert outliers.ejected("a")
    assert not outliers.ejected("b")


def test_a_success_between_starts_the_count_anew():
    outliers = Outliers(LIMITS)
    fail(outliers, 2)
    assert not outliers.succeeded("a")
    assert fail(outliers, 3) == [False, False, True]


def test_never_more_than_the_share_and_never_a_lone_instance():
    outliers = Outliers(LIMITS)
    assert not any(fail(outliers, 10, size=1))
    assert not any(fail(outliers, 10, size=4, ejected=2))
    assert fail(outliers, 1, size=4, ejected=1) == [True]


def test_rests_longer_each_time_and_is_probed_after():
    outliers = Outliers(LIMITS)
    now_s = 0.0
    for rest_s in (5.0, 10.0, 20.0, 40.0, 40.0):
        while not outliers.failed("a", now_s, 4, 0):
            pass
        assert outliers.next_probe_s == now_s + rest_s
        assert not outliers.wake(now_s + rest_s - 0.1)
        now_s += rest_s
        assert outliers.wake(now_s)
        assert outliers.probing("a")
        assert not outliers.ejected("a")


def test_one_failure_ends_a_probe_and_one_success_passes_it():
    outliers = Outliers(LIMITS)
    fail(outliers, 3)
    outliers.wake(5.0)
    assert fail(outliers, 1, now_s=5.0) == [True]
    outliers.wake(15.0)
    assert outliers.succeeded("a")
    assert not outliers.probing("a")
    assert fail(outliers, 2, now_s=16.0) == [False, False]


def test_failures_while_it_rests_do_not_prolong_it():
    outliers = Outliers(LIMITS)
    fail(outliers, 3)
    fail(outliers, 5, now_s=1.0)
    assert outliers.next_probe_s == 5.0


def test_forgets_those_that_have_gone():
    outliers = Outliers(LIMITS)
    fail(outliers, 3)
    outliers.keep(frozenset({"b"}))
    assert not outliers.ejected("a")
    assert not outliers.succeeded("a")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.floats(0, 3)), max_size=80))
def test_the_share_holds_whatever_happens(events):
    outliers, now_s = Outliers(LIMITS), 0.0
    for instance_id, failed, dt in events:
        now_s += dt
        outliers.wake(now_s)
        if failed:
            outliers.failed(instance_id, now_s, 4, sum(outliers.ejected(k) for k in "abcd"))
        else:
            outliers.succeeded(instance_id)
        resting = sum(outliers.ejected(k) for k in "abcd")
        assert resting <= 2
        assert (outliers.next_probe_s == float("inf")) == (resting == 0)

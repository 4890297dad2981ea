"""The queue: order, bound, shedding, expiry."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pool_examples import MODEL, request

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.queue import QueueLimits, RequestQueue

NOBODY = frozenset()


def drain(queue):
    """All that wait, in the order in which they would be offered places."""
    out = []
    while heads := queue.heads():
        waiting = heads[0][-1]
        queue.take(waiting)
        out.append(waiting.request.id)
    return out


def filled(*requests, **limits):
    queue = RequestQueue(QueueLimits(**limits))
    for r in requests:
        queue.push(r, 0.0, NOBODY)
    return queue


def test_important_first_then_urgent_first_then_first_come():
    queue = filled(
        request("late", arrival_s=2.0),
        request("soon", arrival_s=1.0),
        request("important", arrival_s=9.0, priority=1),
        request("same", arrival_s=1.0),
        request("other class", RequestClass.LL, arrival_s=0.5),
    )
    assert drain(queue) == ["important", "other class", "soon", "same", "late"]


def test_the_head_of_a_lane_is_of_its_class():
    queue = filled(request("a", RequestClass.SS), request("b", RequestClass.LL))
    assert queue.head((MODEL, RequestClass.LL)).request.id == "b"
    assert queue.head((MODEL, RequestClass.MM)) is None


def test_sheds_the_least_important_and_of_those_the_least_urgent():
    queue = filled(request("a", priority=0), request("b", priority=-1), request("c", priority=-1, arrival_s=5.0))
    assert queue.shed_below(-1) is None
    assert queue.shed_below(0).id == "c"
    assert queue.shed_below(5).id == "b"
    assert queue.shed_below(5).id == "a"
    assert queue.shed_below(5) is None


def test_sheddable_requests_fill_only_their_share():
    queue = RequestQueue(QueueLimits(max_depth=4, sheddable_share=0.5))
    for n in range(2):
        assert queue.admits(-1)
        queue.push(request(n, priority=-1), 0.0, NOBODY)
    assert not queue.admits(-1)
    assert queue.admits(0)
    queue.cancel("0")
    assert queue.admits(-1)


def test_one_tenant_fills_only_its_share():
    queue = RequestQueue(QueueLimits(max_depth=4, tenant_share=0.5))
    for n in range(2):
        assert queue.has_share("greedy")
        queue.push(request(n, tenant="greedy"), 0.0, NOBODY)
    assert not queue.has_share("greedy")
    assert queue.has_share("modest")
    queue.cancel("1")
    assert queue.has_share("greedy")


def test_gives_up_what_has_waited_its_time():
    queue = RequestQueue(QueueLimits(ttl_s=10.0))
    for n in range(3):
        queue.push(request(n), float(n), NOBODY)
    queue.cancel("0")
    assert queue.next_expiry_s == 11.0
    assert [r.id for r in queue.expired(11.5)] == ["1"]
    assert [r.id for r in queue.expired(11.5)] == []
    assert queue.next_expiry_s == 12.0
    queue.cancel("2")
    assert queue.next_expiry_s == float("inf")


def test_cancelling_what_does_not_wait_says_so():
    assert not filled(request("a")).cancel("b")


def test_dropping_the_unwanted():
    queue = filled(request("a"), request("b", model="gone"))
    assert [w.request.id for w in queue.drop(lambda w: w.request.model == "gone")] == ["b"]
    assert drain(queue) == ["a"]


def test_memory_is_bounded_by_what_waits():
    queue = filled(request("stays", priority=9))
    for n in range(5000):
        queue.push(request(n), 0.0, NOBODY)
        queue.cancel(str(n))
    assert len(queue._least) < 200
    assert drain(queue) == ["stays"]


class QueueMachine(RuleBasedStateMachine):
    """The queue against a plain list."""

    def __init__(self):
        super().__init__()
        self.queue = RequestQueue(QueueLimits(max_depth=8, ttl_s=5.0))
        self.model = {}
        self.now_s = 0.0
        self.count = 0

    @rule(priority=st.integers(-2, 2), c=st.sampled_from(REQUEST_CLASSES), slack=st.floats(0, 10), dt=st.floats(0, 2))
    def push(self, priority, c, slack, dt):
        self.now_s += dt
        if self.queue.admits(priority):
            self.count += 1
            r = request(self.count, c, arrival_s=self.now_s + slack, priority=priority)
            self.queue.push(r, self.now_s, NOBODY)
            self.model[r.id] = (r, self.now_s, self.count)

    @rule()
    def take_first(self):
        heads = self.queue.heads()
        assert bool(heads) == bool(self.model)
        if heads:
            expected = min(self.model.values(), key=lambda m: (-m[0].priority, m[0].deadline_s, m[2]))
            assert heads[0][-1].request is expected[0]
            self.queue.take(heads[0][-1])
            del self.model[expected[0].id]

    @rule(priority=st.integers(-2, 3))
    def shed(self, priority):
        shed = self.queue.shed_below(priority)
        below = [m[0].priority for m in self.model.values() if m[0].priority < priority]
        assert (shed is None) == (not below)
        if shed is not None:
            assert shed.priority == min(below)
            del self.model[shed.id]

    @rule(dt=st.floats(0, 6))
    def expire(self, dt):
        self.now_s += dt
        expected = {k for k, m in self.model.items() if m[1] + 5.0 <= self.now_s}
        assert {r.id for r in self.queue.expired(self.now_s)} == expected
        for k in expected:
            del self.model[k]

    @rule(data=st.data())
    def cancel(self, data):
        if self.model:
            request_id = data.draw(st.sampled_from(sorted(self.model)))
            assert self.queue.cancel(request_id)
            del self.model[request_id]

    @invariant()
    def counts(self):
        assert self.queue.depth == len(self.model) <= 8


TestQueueMachine = QueueMachine.TestCase


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 100)), max_size=30))
def test_leaves_in_order(items):
    queue = filled(*(request(n, arrival_s=s, priority=p) for n, (p, s) in enumerate(items)))
    order = drain(queue)
    assert order == [str(n) for n in sorted(range(len(items)), key=lambda n: (-items[n][0], items[n][1] + 0.4, n))]

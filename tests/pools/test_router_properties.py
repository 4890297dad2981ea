"""What holds whatever happens to the router: a machine of random events, checked after each."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pool_examples import SLOW_STEP, STEP, cluster, request

from energy.profile import step_time_s
from pools import scoring
from pools.classes import REQUEST_CLASSES, RequestClass, Slo
from pools.escalation import EscalationLimits
from pools.instances import InstanceState
from pools.outliers import EjectionLimits
from pools.queue import QueueLimits
from pools.request import Assigned, Queued, Rejected, RejectReason
from pools.router import Router, RouterLimits
from pools.scoring import UNPROMISED_S, Load
from pools.view import EngineLoad

CLASSES = (RequestClass.SS, RequestClass.SM, RequestClass.MM, RequestClass.ML, RequestClass.LL)
LIMITS = RouterLimits(
    queue=QueueLimits(max_depth=6, ttl_s=20.0),
    ejection=EjectionLimits(consecutive_failures=2, base_s=2.0),
    escalation=EscalationLimits(squash_late_s=4.0),
)


class RouterMachine(RuleBasedStateMachine):
    """Every request is in exactly one place, and no instance that must not be is given one."""

    def __init__(self):
        super().__init__()
        self.router = Router(LIMITS)
        self.now_s = 0.0
        self.count = 0
        self.running = {}  # id -> (request, instance id)
        self.waiting = {}  # id -> request
        self.states = {}
        self.asleep = set()

    @initialize(counts=st.dictionaries(st.sampled_from(CLASSES), st.integers(0, 3), min_size=1))
    def start(self, counts):
        self.view = cluster(counts, max_seqs=3, kv_capacity_tokens=20_000)
        self.states = {v.instance.id: v.instance.state for v in self.view.instances}
        self.router.update(self.view, 0.0)

    def assigned(self, r, decision):
        v = next(v for v in self.view.instances if v.instance.id == decision.instance_id)
        pool = next(p for p in self.view.pools if p.name == decision.pool)
        assert v.instance.pool == pool.name
        assert self.states[decision.instance_id] is InstanceState.READY
        assert decision.instance_id not in self.asleep
        assert pool.request_class.dominates(r.request_class)
        self.running[r.id] = (r, decision.instance_id)
        assert sum(i == decision.instance_id for _, i in self.running.values()) <= 3

    def taken(self, r, decision):
        if isinstance(decision, Assigned):
            self.assigned(r, decision)
        elif isinstance(decision, Queued):
            self.waiting[r.id] = r
        else:
            assert isinstance(decision, Rejected)
            assert 0.0 <= decision.retry_after_s <= 30.0

    @rule(
        c=st.sampled_from(REQUEST_CLASSES),
        inputs=st.integers(0, 12_000),
        outputs=st.floats(0.0, 3000.0),
        slo=st.builds(Slo, st.floats(1e-3, 5.0), st.floats(1e-3, 0.2)),
        priority=st.integers(-1, 1),
        exclude=st.frozensets(st.sampled_from(["MM-0", "LL-0", "SS-0"]), max_size=1),
    )
    def arrive(self, c, inputs, outputs, slo, priority, exclude):
        self.count += 1
        r = request(self.count, c, self.now_s, inputs, outputs, slo, priority)
        decision = self.router.route(r, self.now_s, exclude)
        if isinstance(decision, Assigned):
            assert decision.instance_id not in exclude
        elif isinstance(decision, Rejected) and decision.reason is RejectReason.NO_ENDPOINTS:
            assert not decision.contended
        self.taken(r, decision)

    @rule(data=st.data(), how=st.sampled_from(["first", "finished", "failed", "cancelled"]))
    def progress(self, data, how):
        if not self.running:
            return
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        _, instance_id = self.running[request_id]
        if how == "first":
            self.router.on_first_token(request_id, self.now_s)
            return
        del self.running[request_id]
        if how == "finished":
            self.router.on_finished(request_id, 7, self.now_s)
        elif how == "failed":
            self.router.on_failed(request_id, instance_id, self.now_s)
        else:
            self.router.on_cancelled(request_id, self.now_s)

    @rule(data=st.data())
    def give_up_waiting(self, data):
        if self.waiting:
            request_id = data.draw(st.sampled_from(sorted(self.waiting)))
            del self.waiting[request_id]
            self.router.on_cancelled(request_id, self.now_s)

    @rule(dt=st.floats(0.0, 3.0))
    def release(self, dt):
        self.now_s += dt
        for r, decision in self.router.release(self.now_s):
            del self.waiting[r.id]
            self.taken(r, decision)

    @rule(dt=st.floats(0.0, 1.0))
    def escalate(self, dt):
        self.now_s += dt
        for e in self.router.escalate(self.now_s):
            if e.left is None:
                del self.waiting[e.request.id]
            else:
                assert self.running.pop(e.request.id)[1] == e.left
            if isinstance(e.decision, Assigned):
                assert e.decision.instance_id != e.left
            self.taken(e.request, e.decision)

    @rule(data=st.data(), state=st.sampled_from(InstanceState), slow=st.booleans())
    def reconfigure(self, data, state, slow):
        if not self.view.instances:
            return
        k = data.draw(st.integers(0, len(self.view.instances) - 1))
        changed = list(self.view.instances)
        v = changed[k]
        changed[k] = replace(v, instance=replace(v.instance, state=state), step=SLOW_STEP if slow else STEP)
        self.states[v.instance.id] = state
        self.view = replace(self.view, version=self.view.version + 1, instances=tuple(changed))
        self.router.update(self.view, self.now_s)

    @rule(data=st.data(), awake=st.booleans(), running=st.integers(0, 4))
    def scrape(self, data, awake, running):
        if self.states:
            instance_id = data.draw(st.sampled_from(sorted(self.states)))
            (self.asleep.discard if awake else self.asleep.add)(instance_id)
            self.router.observe(instance_id, EngineLoad(running, 0, 0.1, awake), self.now_s)

    @invariant()
    def books_balance(self):
        fleet = self.router.fleet
        assert set(fleet.flights) == set(self.running)
        assert self.router.queue.depth <= 6
        assert self.router.queue.depth <= len(self.waiting)  # those refused since are told at the next release
        for instance_id, i in fleet.index.items():
            own = [r for r, where in self.running.values() if where == instance_id]
            assert fleet.in_flight(instance_id) == len(own) <= fleet.load.in_flight[i]
            assert fleet.load.pending_tokens[i] >= 0.0
            if own:
                promised = [fleet.flights[r.id].promised_tbt_s for r in own]
                assert all(p in (r.slo.tbt_s, UNPROMISED_S) for p, r in zip(promised, own, strict=True))
                assert fleet.load.tbt_limit_s[i] == min(promised)

    @invariant()
    def what_is_settled_is_current(self):
        fleet = self.router.fleet
        fresh = Load(*(list(column) for column in fleet.load))
        for i, v in enumerate(fleet.views):
            step_s = scoring.decode_step_s(v.step, fresh.in_flight[i], fresh.context_tokens[i])
            assert step_s == pytest.approx(
                step_time_s(v.step, 0, 0, max(fresh.in_flight[i], 1), fresh.context_tokens[i])
            )
            scoring.settle(fleet.costs, fresh, i, step_s)
            if i not in fleet.unsettled:
                derived = [(name, column[i]) for name, column in zip(Load._fields[7:], fleet.load[7:], strict=True)]
                assert derived == [(name, column[i]) for name, column in zip(Load._fields[7:], fresh[7:], strict=True)]


RouterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRouterMachine = RouterMachine.TestCase


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(1, 3000), st.integers(0, 5)), min_size=1, max_size=30),
    st.booleans(),
)
def test_an_answer_that_comes_whole_has_begun_when_it_ends(arrivals, one_by_one):
    """Told of first tokens just before the end or not at all, the books are the same."""
    told, whole = (Router(LIMITS) for _ in range(2))
    for router in (told, whole):
        router.update(cluster(dict.fromkeys(CLASSES, 2)), 0.0)
    running = []
    for n, (request_class, input_tokens, ending) in enumerate(arrivals):
        now_s = n * 0.01
        asked = request(n, request_class, now_s, input_tokens)
        decision = told.route(asked, now_s)
        assert whole.route(asked, now_s) == decision
        if isinstance(decision, Assigned):
            running.append(asked.id)
        for request_id in running[: 1 if one_by_one else ending]:
            told.on_first_token(request_id, now_s)
            told.on_finished(request_id, 5, now_s)
            whole.on_finished(request_id, 5, now_s)
            running.remove(request_id)
        assert whole.fleet.load == told.fleet.load
        assert whole.traffic.snapshot() == told.traffic.snapshot()
        assert whole.counts() == told.counts()


def test_a_whole_answer_of_an_instance_on_probation_lets_it_back_in():
    router = Router(LIMITS)
    router.update(cluster({RequestClass.MM: 2}), 0.0)
    for n in range(2):  # as many failures in a row as eject
        assert router.route(request(n), 0.0) == Assigned("MM-0", "MM")
        router.on_failed(str(n), "MM-0", 0.0)
    assert router.fleet.outliers.ejected("MM-0")
    assert router.route(request("a", arrival_s=3.0), 3.0) == Assigned("MM-0", "MM")  # the rest is over: one probe
    assert router.fleet.outliers.probing("MM-0")
    assert router.route(request("b", arrival_s=3.0), 3.0) == Assigned("MM-1", "MM")
    router.on_finished("a", 5, 3.5)
    assert not router.fleet.outliers.probing("MM-0")

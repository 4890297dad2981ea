"""closed_loop against a plain loop over objects that takes every step by itself: nothing jumped, nothing compiled."""

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_closed_loop import C

from energy.closed_loop import LoadShape, closed_loop
from energy.profile import step_time_s


@dataclass
class Sent:
    """One request of a client."""

    client: int
    number: int
    arrival_s: float
    input_tokens: float
    output_tokens: float
    prefilled: float = 0.0
    produced: float = 0.0
    first_s: float = 0.0

    @property
    def reserved(self):
        return self.input_tokens + self.output_tokens


class Reference:
    """The engine and its clients."""

    def __init__(self, shape):
        self.shape = shape
        self.now_s = 0.0
        self.sent = 0
        self.waiting = deque()
        self.running = []
        self.ended = []
        self.produced = 0.0

    def send(self, client):
        shape = self.shape
        spread = 1.0 - shape.shortest_share
        lengths = [
            max(1.0, float(int(nominal * (shape.shortest_share + spread * (self.sent * turn % 1.0)))))
            for nominal, turn in (
                (shape.input_tokens, 0.6180339887498949),
                (shape.output_tokens, 0.7548776662466927),
            )
        ]
        self.waiting.append(Sent(client, self.sent, self.now_s, *lengths))
        self.sent += 1

    def admit(self):
        shape = self.shape
        while self.waiting:
            reserved = sum(r.reserved for r in self.running)
            full = len(self.running) >= shape.max_running
            full = full or reserved + self.waiting[0].reserved > shape.kv_capacity_tokens
            if full and self.running:
                return
            self.running.append(self.waiting.popleft())

    def step(self):
        """One engine step: a token for each that decodes, prompts within what is left of the budget."""
        decoding = [r for r in self.running if r.prefilled >= r.input_tokens]
        budget = self.shape.token_budget - len(decoding)
        new_tokens = attended = 0.0
        for r in sorted(self.running, key=lambda r: r.number):
            if r not in decoding and budget > new_tokens:
                chunk = min(budget - new_tokens, r.input_tokens - r.prefilled)
                attended += chunk * (r.prefilled + 0.5 * chunk)
                r.prefilled += chunk
                new_tokens += chunk
        context = sum(r.input_tokens + r.produced for r in decoding)
        self.now_s += step_time_s(C, new_tokens, attended, float(len(decoding)), context)
        for r in list(self.running):
            if r.prefilled < r.input_tokens:
                continue
            if r.produced == 0.0:
                r.first_s = self.now_s
            r.produced += 1.0
            self.produced += 1.0
            if r.produced >= r.output_tokens:
                self.running.remove(r)
                self.ended.append((r, self.now_s))

    def play(self):
        shape = self.shape
        total = shape.rounds * shape.clients
        free = list(range(shape.clients))
        seen = 0
        while len(self.ended) < total:
            for client in sorted(free):
                if self.sent < total:
                    self.send(client)
            self.admit()
            self.step()
            free = [r.client for r, _ in self.ended[seen:]]
            seen = len(self.ended)
        counted = [(r, end_s) for r, end_s in self.ended if r.number >= shape.warm_up_rounds * shape.clients]
        gaps = [(end_s - r.first_s) / (r.output_tokens - 1.0) if r.output_tokens > 1 else 0.0 for r, end_s in counted]
        ttft_s = sum(r.first_s - r.arrival_s for r, _ in counted) / len(counted)
        return ttft_s, sum(gaps) / len(counted), self.now_s, self.produced


shapes = st.builds(
    LoadShape,
    st.integers(1, 2500).map(float),
    st.integers(1, 80).map(float),
    st.integers(1, 12),
    rounds=st.integers(1, 3),
    warm_up_rounds=st.just(0),
    shortest_share=st.sampled_from([0.5, 0.8, 1.0]),
    max_running=st.sampled_from([2, 5, 1024]),
    token_budget=st.sampled_from([64, 512, 8192]),
    kv_capacity_tokens=st.sampled_from([4000.0, 1e18]),
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_jumps_and_compiling_change_nothing_to_speak_of(shape):
    """A run of equal steps is taken at its mean context: the only approximation there is."""
    ttft_s, tpot_s, duration_s, produced = Reference(shape).play()
    loop = closed_loop(C, shape)
    assert loop.output_tokens == produced
    assert loop.duration_s == pytest.approx(duration_s, rel=1e-3)
    assert loop.ttft_s == pytest.approx(ttft_s, rel=2e-3)
    assert loop.tpot_s == pytest.approx(tpot_s, rel=2e-3, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 2))
def test_warm_up_rounds_are_left_out_of_the_means_and_of_nothing_else(shape, warm_up_rounds):
    shape = shape._replace(rounds=3, warm_up_rounds=warm_up_rounds)
    ttft_s, tpot_s, duration_s, produced = Reference(shape).play()
    loop = closed_loop(C, shape)
    assert (loop.output_tokens, loop.duration_s) == (produced, pytest.approx(duration_s, rel=1e-3))
    assert loop.ttft_s == pytest.approx(ttft_s, rel=2e-3)
    assert loop.tpot_s == pytest.approx(tpot_s, rel=2e-3, abs=1e-12)

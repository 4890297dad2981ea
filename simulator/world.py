"""World: everything the compiled loop of virtual time reads and writes, as named tuples of NumPy arrays.

Columns by engine row, by request slot, by request class or by pool; no behaviour beyond making and growing them. The
driver (``simulator.simulation``) fills in rows and tables between calls of the loop, the loop
(``simulator.kernel``) does the rest.
"""

from typing import Any, NamedTuple

import numpy as np

from energy.profile import StepCoefficients
from pools.scoring import Costs, Load
from simulator.batching import NO_SLOT, BatchState
from simulator.histograms import BUCKETS

# NumPy arrays of float64 and int64; Any, because the functions they are given to take any sequence of numbers
F = Any
N = Any

CLASSES = 9
COEFFICIENTS = np.dtype([(name, np.float64) for name in StepCoefficients._fields])
"""One operating point: a record with the fields of ``StepCoefficients``, by their names."""

IDLE, STEP, RUN = 0, 1, 2  # what an engine row is doing
PREFILL_J, DECODE_J, IDLE_J = 0, 1, 2  # columns of Engines.energy_j


class Engines(NamedTuple):
    """By engine row: the present step or run, and what the row has used."""

    mode: N
    begin_s: F  # of the step or run; of idling
    end_s: F  # key of the event heap
    run_steps: N
    run_seqs: N
    run_context: N
    time: F  # (E, 3) step duration in a run, a quadratic
    energy: F  # (E, 3) step energy in a run, J of the whole instance
    step_j: F  # (E, 2) prefill and decode part of the present step
    tp: N
    operating: N  # row of World.coefficients
    draining: N
    pool: N
    lone_step_s: F  # a step of one token alone
    # since the row was opened, or the last settlement
    energy_j: F  # (E, 3) prefill, decode, idle
    busy_s: F
    # since the last tick
    class_arrivals: N  # (E, 9)
    worst_share: F  # of the SLO, TTFT or TBT; -1 = none seen
    # event heap over rows
    heap: N
    heap_position: N  # -1 = not in it
    heap_size: N  # (1,)


class Flights(NamedTuple):
    """By request slot, beside what the engine's batch state holds."""

    request_class: N
    routed_class: N  # by predicted length
    predicted_tokens: F
    ttft_slo_s: F
    tbt_slo_s: F
    first_s: F
    last_s: F  # of a preempted sequence: when it got its last token; -1 = not preempted since
    free: N  # stack of free slots
    free_count: N  # (1,)


class Routing(NamedTuple):
    """Where classes may go, and the gateway's queue. The driver fills it from ``pools.routes``."""

    pools: N  # (9, P) pools a class may go to, in order
    pool_count: N  # (9,)
    first_count: N  # (9,) how many of those share its traffic
    weight: F  # (9, P) their shares
    credit: F  # (9, P) of the smooth round robin
    members: N  # (P, E) rows that may be given requests
    member_count: N  # (P,)
    fastest: N  # (P,) the member that reads a prompt soonest when empty
    turn: N  # (P,) of the windows of a large pool
    head: N  # (9,) gateway queue, a lane for each class
    tail: N  # (9,)
    depth: N  # (9,)
    whole_pass_s: F  # (1,) when those waiting are offered every row again
    candidates: N  # (E,) scratch
    lone: N  # (1,) scratch
    policy: F  # (5,) see SPREAD ... below


SPREAD, MARGIN, QUEUE_DEPTH, QUEUE_TTL_S, WHOLE_PASS_S = 0, 1, 2, 3, 4  # Routing.policy


class Ledger(NamedTuple):
    """What has happened, by true request class."""

    arrived: N
    finished: N
    rejected: N
    within_slo: N
    within_ttft: N
    within_tbt: N
    input_tokens: N
    output_tokens: N
    preempted: N  # (1,)
    ttft: N  # (9, BUCKETS)
    tbt: N  # (9, BUCKETS) every gap between tokens
    tpot: N  # (9, BUCKETS) mean gap of each request
    # since the last tick, by routed class
    window_requests: N
    window_input: F
    window_output: F


class Arrivals(NamedTuple):
    """A chunk of requests in order of arrival."""

    arrival_s: F
    input_tokens: N
    output_tokens: N
    predicted_tokens: F
    request_class: N
    routed_class: N
    ttft_slo_s: F
    tbt_slo_s: F


class World(NamedTuple):
    """All of it."""

    batch: BatchState
    engines: Engines
    flights: Flights
    routing: Routing
    costs: Costs
    load: Load
    ledger: Ledger
    coefficients: F  # (K,) records of StepCoefficients, by operating point


def _ints(*shape: int, fill: int = 0) -> N:
    return np.full(shape, fill, dtype=np.int64)


def _floats(*shape: int, fill: float = 0.0) -> F:
    return np.full(shape, fill, dtype=np.float64)


def make_world(rows: int, slots: int, pools: int, max_num_seqs: int, coefficients: F) -> World:
    """A world of this many engine rows and pools, with room for ``slots`` requests at a time."""
    return World(
        batch=_batch(rows, slots, max_num_seqs),
        engines=_engines(rows),
        flights=Flights(
            request_class=_ints(slots),
            routed_class=_ints(slots),
            predicted_tokens=_floats(slots),
            ttft_slo_s=_floats(slots),
            tbt_slo_s=_floats(slots),
            first_s=_floats(slots),
            last_s=_floats(slots, fill=-1.0),
            free=np.arange(slots, dtype=np.int64)[::-1].copy(),
            free_count=_ints(1, fill=slots),
        ),
        routing=_routing(rows, pools),
        costs=Costs(*(_floats(rows) for _ in Costs._fields)),
        load=Load(*(_floats(rows) for _ in Load._fields)),
        ledger=_ledger(),
        coefficients=coefficients,
    )


def _routing(rows: int, pools: int) -> Routing:
    return Routing(
        pools=_ints(CLASSES, pools),
        pool_count=_ints(CLASSES),
        first_count=_ints(CLASSES),
        weight=_floats(CLASSES, pools),
        credit=_floats(CLASSES, pools),
        members=_ints(pools, rows),
        member_count=_ints(pools),
        fastest=_ints(pools),
        turn=_ints(pools),
        head=_ints(CLASSES, fill=NO_SLOT),
        tail=_ints(CLASSES, fill=NO_SLOT),
        depth=_ints(CLASSES),
        whole_pass_s=_floats(1),
        candidates=_ints(rows),
        lone=_ints(1),
        policy=_floats(5),
    )


def _batch(rows: int, slots: int, max_num_seqs: int) -> BatchState:
    columns: dict[str, Any] = {
        "input_tokens": _ints(slots),
        "output_tokens": _ints(slots),
        "computed_tokens": _ints(slots),
        "generated_tokens": _ints(slots),
        "scheduled_tokens": _ints(slots),
        "blocks": _ints(slots),
        "priority": _ints(slots),
        "arrival_s": _floats(slots),
        "next_slot": _ints(slots, fill=NO_SLOT),
        "running": _ints(rows, max_num_seqs),
        "running_count": _ints(rows),
        "waiting_head": _ints(rows, fill=NO_SLOT),
        "waiting_tail": _ints(rows, fill=NO_SLOT),
        "waiting_count": _ints(rows),
        "free_blocks": _ints(rows),
        "emitted": _ints(rows, max_num_seqs),
        "finished": _ints(rows, max_num_seqs),
        "preempted": _ints(rows, max_num_seqs),
    }
    return BatchState(**columns)


def _engines(rows: int) -> Engines:
    return Engines(
        mode=_ints(rows),
        begin_s=_floats(rows),
        end_s=_floats(rows),
        run_steps=_ints(rows),
        run_seqs=_ints(rows),
        run_context=_ints(rows),
        time=_floats(rows, 3),
        energy=_floats(rows, 3),
        step_j=_floats(rows, 2),
        tp=_ints(rows),
        operating=_ints(rows),
        draining=_ints(rows),
        pool=_ints(rows),
        lone_step_s=_floats(rows),
        energy_j=_floats(rows, 3),
        busy_s=_floats(rows),
        class_arrivals=_ints(rows, CLASSES),
        worst_share=_floats(rows, fill=-1.0),
        heap=_ints(rows),
        heap_position=_ints(rows, fill=-1),
        heap_size=_ints(1),
    )


def _ledger() -> Ledger:
    return Ledger(
        arrived=_ints(CLASSES),
        finished=_ints(CLASSES),
        rejected=_ints(CLASSES),
        within_slo=_ints(CLASSES),
        within_ttft=_ints(CLASSES),
        within_tbt=_ints(CLASSES),
        input_tokens=_ints(CLASSES),
        output_tokens=_ints(CLASSES),
        preempted=_ints(1),
        ttft=_ints(CLASSES, BUCKETS),
        tbt=_ints(CLASSES, BUCKETS),
        tpot=_ints(CLASSES, BUCKETS),
        window_requests=_ints(CLASSES),
        window_input=_floats(CLASSES),
        window_output=_floats(CLASSES),
    )


_SLOT_COLUMNS = (
    "input_tokens",
    "output_tokens",
    "computed_tokens",
    "generated_tokens",
    "scheduled_tokens",
    "blocks",
    "priority",
    "arrival_s",
    "next_slot",
)


def with_more_slots(world: World) -> World:
    """The same world with twice the request slots."""
    before = len(world.flights.request_class)

    def twice(column: Any) -> Any:
        return np.concatenate([column, np.zeros_like(column)])

    batch = world.batch._replace(**{name: twice(getattr(world.batch, name)) for name in _SLOT_COLUMNS})
    grown = {name: twice(getattr(world.flights, name)) for name in Flights._fields if name != "free_count"}
    flights = world.flights._replace(**grown)
    flights.last_s[before:] = -1.0
    count = int(flights.free_count[0])
    flights.free[count : count + before] = np.arange(2 * before - 1, before - 1, -1)
    flights.free_count[0] = count + before
    return world._replace(batch=batch, flights=flights)

"""World: everything the compiled loop of virtual time reads and writes, in one block of memory.

Columns by engine row, by request slot, by request class or by pool; no behaviour. The block is one NumPy record of
fixed capacity, because a compiled function takes a record as a single pointer where it would take named tuples of a
hundred arrays apart, and back together, at every call. The driver sees the same memory as named tuples of arrays.

The driver (``simulator.simulation``) fills in rows and tables between calls of the loop, the loop
(``simulator.kernel``) does the rest. Memory that is not used is never touched, so capacity costs nothing.
"""

from typing import Any, NamedTuple

import numpy as np

from energy.profile import StepCoefficients
from pools.scoring import LOAD_EMPTY, Costs, Load
from simulator.batching import NO_SLOT, BatchState
from simulator.histograms import BUCKETS

# NumPy arrays of float64 and int64; Any, because the functions they are given to take any sequence of numbers
F = Any
N = Any

CLASSES = 9
ROWS = 16_384  # instances at a time; memory is taken as rows are used
SLOTS = 1 << 20  # requests in the system at a time
SEQS = 512  # sequences of one engine
POOLS = 16
POINTS = 256  # (TP, clock) pairs

IDLE, STEP, RUN = 0, 1, 2  # what an engine row is doing
PREFILL_J, DECODE_J, IDLE_J = 0, 1, 2  # columns of Engines.energy_j
SPREAD, MARGIN, QUEUE_DEPTH, QUEUE_TTL_S, WHOLE_PASS_S = 0, 1, 2, 3, 4  # Routing.policy

COEFFICIENTS = np.dtype([(name, np.float64) for name in StepCoefficients._fields])
"""One operating point: a record with the fields of ``StepCoefficients``, by their names."""


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
    late: N  # requests found over their TTFT or TBT, each once
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
    waiting: N  # (1,) in all lanes
    whole_pass_s: F  # (1,) when those waiting are offered every row again
    candidates: N  # (E,) scratch
    lone: N  # (1,) scratch
    policy: F  # (5,) see SPREAD ... above


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
    """All of it. In compiled code a record with the same fields stands in its place."""

    batch: BatchState
    engines: Engines
    flights: Flights
    routing: Routing
    costs: Costs
    load: Load
    ledger: Ledger
    coefficients: F  # (K,) records of StepCoefficients, by operating point
    record: Any  # the block itself: what the compiled functions take


_ENGINE_SHAPES = {
    "time": (ROWS, 3),
    "energy": (ROWS, 3),
    "step_j": (ROWS, 2),
    "energy_j": (ROWS, 3),
    "class_arrivals": (ROWS, CLASSES),
    "heap_size": (1,),
}
_ROUTING_SHAPES = {
    "pools": (CLASSES, POOLS),
    "weight": (CLASSES, POOLS),
    "credit": (CLASSES, POOLS),
    "members": (POOLS, ROWS),
    "member_count": (POOLS,),
    "fastest": (POOLS,),
    "turn": (POOLS,),
    "waiting": (1,),
    "whole_pass_s": (1,),
    "candidates": (ROWS,),
    "lone": (1,),
    "policy": (5,),
}
_LEDGER_SHAPES = {
    "preempted": (1,),
    "ttft": (CLASSES, BUCKETS),
    "tbt": (CLASSES, BUCKETS),
    "tpot": (CLASSES, BUCKETS),
}
_BATCH_SHAPES = {
    **dict.fromkeys(("running", "emitted", "finished", "preempted"), (ROWS, SEQS)),
    **dict.fromkeys(("running_count", "waiting_head", "waiting_tail", "waiting_count", "free_blocks"), (ROWS,)),
}
_FLOATS = frozenset(
    {
        "arrival_s",
        "begin_s",
        "end_s",
        "time",
        "energy",
        "step_j",
        "lone_step_s",
        "energy_j",
        "busy_s",
        "worst_share",
        "predicted_tokens",
        "ttft_slo_s",
        "tbt_slo_s",
        "first_s",
        "last_s",
        "weight",
        "credit",
        "whole_pass_s",
        "policy",
        "window_input",
        "window_output",
    }
)


def _layout(names: tuple[str, ...], shapes: dict[str, tuple[int, ...]], default: tuple[int, ...]) -> np.dtype[Any]:
    return np.dtype([(n, np.float64 if n in _FLOATS else np.int64, shapes.get(n, default)) for n in names])


_LAYOUT = np.dtype(
    [
        ("batch", _layout(BatchState._fields, _BATCH_SHAPES, (SLOTS,))),
        ("engines", _layout(Engines._fields, _ENGINE_SHAPES, (ROWS,))),
        ("flights", _layout(Flights._fields, {"free_count": (1,)}, (SLOTS,))),
        ("routing", _layout(Routing._fields, _ROUTING_SHAPES, (CLASSES,))),
        ("costs", np.dtype([(name, np.float64, (ROWS,)) for name in Costs._fields])),
        ("load", np.dtype([(name, np.float64, (ROWS,)) for name in Load._fields])),
        ("ledger", _layout(Ledger._fields, _LEDGER_SHAPES, (CLASSES,))),
        ("coefficients", COEFFICIENTS, (POINTS,)),
    ]
)


def make_world(coefficients: F) -> World:
    """An empty world with these operating points. Raises ``ValueError`` if they are too many."""
    if len(coefficients) > POINTS:
        raise ValueError(f"{len(coefficients)} operating points are more than {POINTS}; give the profile fewer clocks")
    block: Any = np.zeros(1, dtype=_LAYOUT)
    record = block[0]

    def views(name: str) -> list[Any]:
        return [record[name][field] for field in _LAYOUT[name].names or ()]

    world = World(
        batch=BatchState(*views("batch")),
        engines=Engines(*views("engines")),
        flights=Flights(*views("flights")),
        routing=Routing(*views("routing")),
        costs=Costs(*views("costs")),
        load=Load(*views("load")),
        ledger=Ledger(*views("ledger")),
        coefficients=record["coefficients"],
        record=record,
    )
    world.coefficients[: len(coefficients)] = coefficients
    _fill(world)
    return world


def _fill(world: World) -> None:
    """What does not begin as 0."""
    batch: Any = world.batch
    batch.waiting_head[:] = NO_SLOT
    batch.waiting_tail[:] = NO_SLOT
    world.engines.worst_share[:] = -1.0
    world.engines.heap_position[:] = -1
    world.flights.free[:] = np.arange(SLOTS)[::-1]
    world.flights.free_count[0] = SLOTS
    world.routing.head[:] = NO_SLOT
    world.routing.tail[:] = NO_SLOT
    column: Any
    for column, value in zip(world.load, LOAD_EMPTY, strict=True):
        column[:] = value

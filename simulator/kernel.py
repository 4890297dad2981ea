"""The compiled loop of virtual time: arrivals and engine events in order, until the driver is needed.

Each engine row is idle, in one step (prompts are being read) or in a run of decode steps (``simulator.runs``); its next
event is the end of that. Between two events nothing changes, so nothing is computed. Order of events: time, then
engines before arrivals before those waiting, then row number; so one seed gives one result.

The loop knows no policies and no controllers: rows are opened, closed and re-clocked by the driver between calls.
Energy is kept by row as prefill (what a mixed step costs beyond its decodes), decode and idle; the rest is the
driver's.
"""

from typing import Any

from energy.profile import StepCoefficients, step_power_w, step_time_s
from pools.scoring import add, decode_step_s, remove, settle, start
from simulator.batching import NO_SLOT, EngineLimits, complete, enqueue, schedule
from simulator.columns import costs_of, load_of
from simulator.dispatch import choose_row, find
from simulator.eventheap import EventHeap, clear_event, set_event
from simulator.histograms import bucket_of
from simulator.runs import (
    Quadratic,
    advance,
    may_admit,
    quadratic_through,
    run_length,
    steps_until,
    sum_of_steps,
    value_at,
)
from simulator.world import (
    CLASSES,
    DECODE_J,
    IDLE,
    IDLE_J,
    PREFILL_J,
    QUEUE_DEPTH,
    QUEUE_TTL_S,
    RUN,
    STEP,
    WHOLE_PASS_S,
    Arrivals,
    World,
)

NEVER_S = 1e300
UNTIL, CHUNK, EMPTY = 0, 1, 2  # why the loop came back
MOST_SEGMENTS = 8  # a run is entered into the TBT histogram in at most so many pieces


def run_loop(
    w: World, limits: EngineLimits, arrivals: Arrivals, cursor: int, more: bool, until_s: float
) -> tuple[int, int, int]:
    """Go on until ``until_s``, the end of the chunk, or a draining row that is empty.

    Returns (why, cursor, row); ``more`` says that another chunk follows this one.
    """
    x = w.engines
    heap = EventHeap(x.heap, x.heap_position, x.heap_size, x.end_s)
    count = len(arrivals.arrival_s)
    while True:
        if cursor == count and more:
            return CHUNK, cursor, -1
        arrival_s = arrivals.arrival_s[cursor] if cursor < count else NEVER_S
        pass_s = w.routing.whole_pass_s[0] if w.routing.waiting[0] > 0 else NEVER_S
        event_s = x.end_s[x.heap[0]] if x.heap_size[0] > 0 else NEVER_S
        if min(event_s, arrival_s, pass_s) > until_s:
            return UNTIL, cursor, -1
        if event_s <= arrival_s and event_s <= pass_s:
            e = x.heap[0]
            end_event(w, limits, heap, e, event_s)
            _serve_lanes(w, limits, heap, e, event_s)
            if x.mode[e] == IDLE and x.draining[e] != 0:
                return EMPTY, cursor, e
        elif arrival_s <= pass_s:
            _arrive(w, limits, heap, arrivals, cursor)
            cursor += 1
        else:
            _serve_lanes(w, limits, heap, NO_SLOT, pass_s)


def _arrive(w: World, limits: EngineLimits, heap: EventHeap, a: Arrivals, i: int) -> None:
    """Take a request in: a slot, then a row or its lane."""
    f = w.flights
    s = w.batch
    ledger = w.ledger
    k = a.routed_class[i]
    ledger.arrived[a.request_class[i]] += 1
    ledger.window_requests[k] += 1
    ledger.window_input[k] += a.input_tokens[i]
    ledger.window_output[k] += a.predicted_tokens[i]
    if f.free_count[0] == 0:
        ledger.rejected[a.request_class[i]] += 1
        return
    f.free_count[0] -= 1
    slot = f.free[f.free_count[0]]
    s.input_tokens[slot] = a.input_tokens[i]
    s.output_tokens[slot] = a.output_tokens[i]
    s.computed_tokens[slot] = 0
    s.generated_tokens[slot] = 0
    s.scheduled_tokens[slot] = 0
    s.blocks[slot] = 0
    s.arrival_s[slot] = a.arrival_s[i]
    s.next_slot[slot] = NO_SLOT
    f.request_class[slot] = a.request_class[i]
    f.routed_class[slot] = k
    f.predicted_tokens[slot] = a.predicted_tokens[i]
    f.ttft_slo_s[slot] = a.ttft_slo_s[i]
    f.tbt_slo_s[slot] = a.tbt_slo_s[i]
    f.last_s[slot] = -1.0
    if w.routing.depth[k] == 0 and _try_place(w, limits, heap, slot, NO_SLOT, a.arrival_s[i]):
        return
    _wait(w, slot, k, a.arrival_s[i])


def _wait(w: World, slot: int, k: int, now_s: float) -> None:
    """Put a request into its lane, or refuse it where too many wait."""
    r = w.routing
    if r.waiting[0] >= r.policy[QUEUE_DEPTH]:
        _reject(w, slot)
        return
    if r.depth[k] == 0:
        r.head[k] = slot
    else:
        w.batch.next_slot[r.tail[k]] = slot
    r.tail[k] = slot
    r.depth[k] += 1
    r.waiting[0] += 1
    if r.waiting[0] == 1:
        r.whole_pass_s[0] = now_s + r.policy[WHOLE_PASS_S]


def _reject(w: World, slot: int) -> None:
    w.ledger.rejected[w.flights.request_class[slot]] += 1
    _free_slot(w, slot)


def _try_place(w: World, limits: EngineLimits, heap: EventHeap, slot: int, only: int, now_s: float) -> bool:
    """Give a request to a row with headroom (to row ``only``, unless that is ``NO_SLOT``)."""
    f = w.flights
    s = w.batch
    inputs = float(s.input_tokens[slot])
    outputs = f.predicted_tokens[slot]
    budget_s = s.arrival_s[slot] + f.ttft_slo_s[slot] - now_s
    k = f.routed_class[slot]
    if only == NO_SLOT:
        e = find(w, k, now_s, inputs, outputs, budget_s, f.tbt_slo_s[slot])
    else:
        e = choose_row(w, k, only, now_s, inputs, outputs, budget_s, f.tbt_slo_s[slot])
    if e < 0:
        return False
    add(costs_of(w), load_of(w), e, now_s, inputs, outputs, f.tbt_slo_s[slot])
    refresh_load(w, e)
    w.engines.class_arrivals[e, k] += 1
    s.next_slot[slot] = NO_SLOT
    enqueue(s, e, slot, limits.by_priority)
    _wake_up(w, limits, heap, e, now_s)
    return True


def serve_lanes(w: World, limits: EngineLimits, now_s: float) -> None:
    """Offer those waiting every row again: called by the driver when it has opened or re-clocked rows."""
    x = w.engines
    w.routing.whole_pass_s[0] = now_s
    _serve_lanes(w, limits, EventHeap(x.heap, x.heap_position, x.heap_size, x.end_s), NO_SLOT, now_s)


def _serve_lanes(w: World, limits: EngineLimits, heap: EventHeap, freed: int, now_s: float) -> None:
    """Offer the row something has left to those waiting, most urgent lane first; every row from time to time."""
    r = w.routing
    if r.waiting[0] == 0:
        return
    if now_s >= r.whole_pass_s[0]:
        r.whole_pass_s[0] = now_s + r.policy[WHOLE_PASS_S]
        freed = NO_SLOT
    done = 0
    while True:
        k = _most_urgent_lane(w, done)
        if k < 0:
            return
        slot = r.head[k]
        behind = w.batch.next_slot[slot]
        if now_s - w.batch.arrival_s[slot] > r.policy[QUEUE_TTL_S]:
            _reject(w, slot)
        elif not _try_place(w, limits, heap, slot, freed, now_s):
            done |= 1 << k
            continue
        r.head[k] = behind
        r.depth[k] -= 1
        r.waiting[0] -= 1


def _most_urgent_lane(w: World, done: int) -> int:
    """The lane whose head has the earliest deadline, of those not in the set ``done``; or -1."""
    r = w.routing
    best = -1
    best_s = 0.0
    for k in range(CLASSES):
        if r.depth[k] == 0 or done & (1 << k):
            continue
        deadline_s = w.batch.arrival_s[r.head[k]] + w.flights.ttft_slo_s[r.head[k]]
        if best < 0 or deadline_s < best_s:
            best = k
            best_s = deadline_s
    return best


def _wake_up(w: World, limits: EngineLimits, heap: EventHeap, e: int, now_s: float) -> None:
    """A sequence has joined the queue of row ``e``: start at once if idle, end a run at its next step."""
    x = w.engines
    if x.mode[e] == IDLE:
        settle_idle(w, e, now_s)
        begin_next(w, limits, heap, e, now_s)
    elif x.mode[e] == RUN and may_admit(w.batch, e, limits):
        cut_run(w, heap, e, now_s)


def cut_run(w: World, heap: EventHeap, e: int, now_s: float) -> None:
    """End the run of row ``e`` with the step it is in."""
    x = w.engines
    time = quadratic(x.time, e)
    steps = steps_until(time, x.run_steps[e], now_s - x.begin_s[e])
    if steps < x.run_steps[e]:
        x.run_steps[e] = steps
        set_event(heap, e, x.begin_s[e] + sum_of_steps(time, steps))


def settle_idle(w: World, e: int, now_s: float) -> None:
    """Charge row ``e`` for idling until now."""
    x = w.engines
    power_w = coefficients_of(w, e).idle_w * x.tp[e]
    x.energy_j[e, IDLE_J] += power_w * (now_s - x.begin_s[e])
    x.begin_s[e] = now_s


def energy_until(w: World, rows: Any, now_s: float, out: Any) -> None:
    """Prefill, decode and idle joules of these rows up to now, their present step or run in part; into (n, 3)."""
    x = w.engines
    for index in range(len(rows)):
        e = rows[index]
        for part in range(3):
            out[index, part] = x.energy_j[e, part]
        gone_s = now_s - x.begin_s[e]
        if x.mode[e] == IDLE:
            out[index, IDLE_J] += coefficients_of(w, e).idle_w * x.tp[e] * gone_s
            continue
        share = gone_s / (x.end_s[e] - x.begin_s[e])
        if x.mode[e] == RUN:
            out[index, DECODE_J] += share * sum_of_steps(quadratic(x.energy, e), x.run_steps[e])
        else:
            out[index, PREFILL_J] += share * x.step_j[e, PREFILL_J]
            out[index, DECODE_J] += share * x.step_j[e, DECODE_J]


def reclock(w: World, e: int, operating: int, now_s: float) -> None:
    """Row ``e`` runs at another operating point from its next step on; a run ends with the step it is in."""
    x = w.engines
    if x.mode[e] == IDLE:
        settle_idle(w, e, now_s)
    elif x.mode[e] == RUN:
        cut_run(w, EventHeap(x.heap, x.heap_position, x.heap_size, x.end_s), e, now_s)
    x.operating[e] = operating
    x.lone_step_s[e] = decode_step_s(coefficients_of(w, e), 0.0, 0.0)
    refresh_load(w, e)


def refresh_load(w: World, e: int) -> None:
    """Let the router see what row ``e`` now holds."""
    step_s = decode_step_s(coefficients_of(w, e), w.load.in_flight[e], w.load.context_tokens[e])
    settle(costs_of(w), load_of(w), e, step_s)


def coefficients_of(w: World, e: int) -> StepCoefficients:
    """What a step costs on row ``e`` at its present clock."""
    record: StepCoefficients = w.coefficients[w.engines.operating[e]]
    return record


def quadratic(table: Any, e: int) -> Quadratic:
    """Row ``e`` of a table of quadratics."""
    return Quadratic(table[e, 0], table[e, 1], table[e, 2])


def begin_next(w: World, limits: EngineLimits, heap: EventHeap, e: int, now_s: float) -> None:
    """At a step boundary of row ``e``: begin a run, a step, or idling."""
    x = w.engines
    s = w.batch
    x.begin_s[e] = now_s
    if s.running_count[e] == 0 and s.waiting_count[e] == 0:
        x.mode[e] = IDLE
        clear_event(heap, e)
        return
    steps, context_tokens = run_length(s, e, limits)
    if steps > 0:
        _begin_run(w, e, steps, context_tokens)
    else:
        _begin_step(w, limits, e, now_s)
    set_event(heap, e, x.end_s[e])


def _begin_run(w: World, e: int, steps: int, context_tokens: int) -> None:
    x = w.engines
    c = coefficients_of(w, e)
    seqs = float(w.batch.running_count[e])
    gpus = float(x.tp[e])
    first = float(context_tokens)
    last = first + seqs * (steps - 1)
    middle = 0.5 * (first + last)
    t0 = step_time_s(c, 0.0, 0.0, seqs, first)
    j0 = t0 * step_power_w(c, 0.0, 0.0, seqs, first) * gpus
    t1, j1, t2, j2 = t0, j0, t0, j0
    if steps > 1:
        t2 = step_time_s(c, 0.0, 0.0, seqs, last)
        j2 = t2 * step_power_w(c, 0.0, 0.0, seqs, last) * gpus
        t1 = step_time_s(c, 0.0, 0.0, seqs, middle)
        j1 = t1 * step_power_w(c, 0.0, 0.0, seqs, middle) * gpus
    time = quadratic_through(t0, t1, t2, steps)
    energy = quadratic_through(j0, j1, j2, steps)
    for index in range(3):
        x.time[e, index] = time[index]
        x.energy[e, index] = energy[index]
    x.mode[e] = RUN
    x.run_steps[e] = steps
    x.run_seqs[e] = w.batch.running_count[e]
    x.run_context[e] = context_tokens
    x.end_s[e] = x.begin_s[e] + sum_of_steps(time, steps)


def _begin_step(w: World, limits: EngineLimits, e: int, now_s: float) -> None:
    x = w.engines
    f = w.flights
    s = w.batch
    batch = schedule(s, e, limits)
    for index in range(batch.preempted):
        slot = s.preempted[e][index]
        if s.generated_tokens[slot] > 0 and f.last_s[slot] < 0.0:
            f.last_s[slot] = now_s
    w.ledger.preempted[0] += batch.preempted
    c = coefficients_of(w, e)
    prefill = float(batch.prefill_tokens)
    attention = batch.prefill_attention_tokens2
    seqs = float(batch.decode_seqs)
    context = float(batch.context_tokens)
    gpus = float(x.tp[e])
    duration_s = step_time_s(c, prefill, attention, seqs, context)
    energy_j = duration_s * step_power_w(c, prefill, attention, seqs, context) * gpus
    decode_j = 0.0
    if batch.decode_seqs > 0:
        decode_s = step_time_s(c, 0.0, 0.0, seqs, context)
        decode_j = min(energy_j, decode_s * step_power_w(c, 0.0, 0.0, seqs, context) * gpus)
    x.mode[e] = STEP
    x.step_j[e, PREFILL_J] = energy_j - decode_j
    x.step_j[e, DECODE_J] = decode_j
    x.end_s[e] = now_s + duration_s


def end_event(w: World, limits: EngineLimits, heap: EventHeap, e: int, now_s: float) -> None:
    """The step or run of row ``e`` is over: account for it, let the finished go, begin what comes next."""
    x = w.engines
    x.busy_s[e] += now_s - x.begin_s[e]
    if x.mode[e] == RUN:
        _end_run(w, limits, e, now_s)
    else:
        _end_step(w, e, now_s)
    begin_next(w, limits, heap, e, now_s)


def _end_run(w: World, limits: EngineLimits, e: int, now_s: float) -> None:
    x = w.engines
    s = w.batch
    steps = x.run_steps[e]
    x.energy_j[e, DECODE_J] += sum_of_steps(quadratic(x.energy, e), steps)
    _count_run(w, e, steps)
    finished = advance(s, e, steps, limits.block_tokens)
    for index in range(finished):
        _finish(w, e, s.finished[e][index], now_s)
    if finished > 0:
        refresh_load(w, e)


def _count_run(w: World, e: int, steps: int) -> None:
    """Enter the gaps between tokens of a run, in pieces over which a step stays within one bucket."""
    s = w.batch
    time = quadratic(w.engines.time, e)
    tbt = w.ledger.tbt
    spread = abs(bucket_of(value_at(time, steps - 1)) - bucket_of(time.a))
    segments = min(spread + 1, MOST_SEGMENTS, steps)
    done = 0
    worst = 0.0
    for segment in range(segments):
        upto = (steps * (segment + 1)) // segments
        step_s = value_at(time, 0.5 * (done + upto - 1))
        worst = max(worst, step_s)
        bucket = bucket_of(step_s)
        for position in range(s.running_count[e]):
            tbt[w.flights.request_class[s.running[e][position]], bucket] += upto - done
        done = upto


def _end_step(w: World, e: int, now_s: float) -> None:
    x = w.engines
    s = w.batch
    f = w.flights
    x.energy_j[e, PREFILL_J] += x.step_j[e, PREFILL_J]
    x.energy_j[e, DECODE_J] += x.step_j[e, DECODE_J]
    emitted, finished = complete(s, e)
    step_bucket = bucket_of(now_s - x.begin_s[e])
    for index in range(emitted):
        slot = s.emitted[e][index]
        if s.generated_tokens[slot] == 1:
            _first_token(w, e, slot, now_s)
            continue
        bucket = step_bucket
        if f.last_s[slot] >= 0.0:
            bucket = bucket_of(now_s - f.last_s[slot])
            f.last_s[slot] = -1.0
        w.ledger.tbt[f.request_class[slot], bucket] += 1
    for index in range(finished):
        _finish(w, e, s.finished[e][index], now_s)
    if finished > 0:
        refresh_load(w, e)


def _first_token(w: World, e: int, slot: int, now_s: float) -> None:
    f = w.flights
    f.first_s[slot] = now_s
    ttft_s = now_s - w.batch.arrival_s[slot]
    w.ledger.ttft[f.request_class[slot], bucket_of(ttft_s)] += 1
    x = w.engines
    x.worst_share[e] = max(x.worst_share[e], ttft_s / f.ttft_slo_s[slot])
    x.late[e] += ttft_s > f.ttft_slo_s[slot]
    start(load_of(w), e, now_s, float(w.batch.input_tokens[slot]))


def _finish(w: World, e: int, slot: int, now_s: float) -> None:
    """The last token of a request: judge it, forget it."""
    f = w.flights
    s = w.batch
    ledger = w.ledger
    k = f.request_class[slot]
    outputs = s.output_tokens[slot]
    ttft_s = f.first_s[slot] - s.arrival_s[slot]
    tpot_s = 0.0
    if outputs > 1:
        tpot_s = (now_s - f.first_s[slot]) / (outputs - 1)
        ledger.tpot[k, bucket_of(tpot_s)] += 1
        w.engines.worst_share[e] = max(w.engines.worst_share[e], tpot_s / f.tbt_slo_s[slot])
    in_ttft = ttft_s <= f.ttft_slo_s[slot]
    in_tbt = tpot_s <= f.tbt_slo_s[slot]
    w.engines.late[e] += in_ttft and not in_tbt  # a late first token was counted when it came
    ledger.finished[k] += 1
    ledger.within_ttft[k] += in_ttft
    ledger.within_tbt[k] += in_tbt
    ledger.within_slo[k] += in_ttft and in_tbt
    ledger.input_tokens[k] += s.input_tokens[slot]
    ledger.output_tokens[k] += outputs
    remove(load_of(w), e, float(s.input_tokens[slot]), f.predicted_tokens[slot])
    _free_slot(w, slot)


def _free_slot(w: World, slot: int) -> None:
    f = w.flights
    f.free[f.free_count[0]] = slot
    f.free_count[0] += 1

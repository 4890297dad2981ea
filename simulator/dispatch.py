"""Dispatch: the gateway's decision in virtual time. Each arrival goes to an engine row, or waits in its class's lane.

The arithmetic and the policy are the product's own (``pools.scoring``), compiled; where a class may go is a table the
driver fills from ``pools.routes``. This file walks that table in the order ``pools.router.Router`` does: pools in turn,
windows of a pool in turn, and the least late of all where even an empty instance would break the promise.
"""

from pools.scoring import NONE, attainable, choose, choose_least_late, take_turn
from simulator.columns import costs_of, load_of
from simulator.world import MARGIN, SPREAD, World

WINDOW = 32  # candidates looked at together, as in pools.fleet


def find(
    w: World, k: int, now_s: float, input_tokens: float, output_tokens: float, budget_s: float, tbt_slo_s: float
) -> int:
    """The row for a request of class ``k`` with ``budget_s`` left to its deadline, or ``NONE``: then it waits."""
    r = w.routing
    firsts = r.first_count[k]
    turn = 0
    if firsts > 1:
        turn = take_turn(r.weight[k, :firsts], r.credit[k, :firsts])
    for index in range(r.pool_count[k]):
        p = r.pools[k, _in_turn(index, turn, firsts)]
        row = _choose_in_pool(w, p, now_s, input_tokens, output_tokens, budget_s, tbt_slo_s)
        if row != NONE:
            return row
    if _hopeless(w, k, input_tokens, output_tokens, budget_s, tbt_slo_s):
        return _least_late(w, k, now_s, input_tokens, output_tokens)
    return NONE


def _in_turn(index: int, turn: int, firsts: int) -> int:
    """Position of the pool to try: the one whose turn it is, then the others in their order."""
    if index >= firsts:
        return index
    if index == 0:
        return turn
    return index - 1 if index <= turn else index


def _choose_in_pool(
    w: World, p: int, now_s: float, input_tokens: float, output_tokens: float, budget_s: float, tbt_slo_s: float
) -> int:
    r = w.routing
    count = r.member_count[p]
    windows = (count + WINDOW - 1) // WINDOW
    turn = 0
    if windows > 1:
        turn = (r.turn[p] + 1) % windows
        r.turn[p] = turn
    for index in range(windows):
        window = (index + turn) % windows
        begin = window * (count // windows) + min(window, count % windows)
        size = count // windows + (window < count % windows)
        row = choose(
            r.members[p, begin : begin + size],
            costs_of(w),
            load_of(w),
            now_s,
            input_tokens,
            output_tokens,
            budget_s,
            tbt_slo_s,
            r.policy[SPREAD],
            r.policy[MARGIN],
        )
        if row != NONE:
            return row
    return NONE


def choose_row(
    w: World, k: int, e: int, now_s: float, input_tokens: float, output_tokens: float, budget_s: float, tbt_slo_s: float
) -> int:
    """Row ``e``, from which something has just left, if class ``k`` may go there and it has headroom; or ``NONE``."""
    r = w.routing
    pool = w.engines.pool[e]
    for index in range(r.pool_count[k]):
        if r.pools[k, index] == pool:
            r.lone[0] = e
            return choose(
                r.lone,
                costs_of(w),
                load_of(w),
                now_s,
                input_tokens,
                output_tokens,
                budget_s,
                tbt_slo_s,
                r.policy[SPREAD],
                r.policy[MARGIN],
            )
    return NONE


def _hopeless(w: World, k: int, input_tokens: float, output_tokens: float, budget_s: float, tbt_slo_s: float) -> bool:
    """Whether even an empty instance would break the promise, so that waiting for one is no use."""
    r = w.routing
    for index in range(r.pool_count[k]):
        p = r.pools[k, index]
        if r.member_count[p] > 0 and attainable(
            costs_of(w),
            r.fastest[p],
            w.engines.lone_step_s[r.fastest[p]],
            input_tokens,
            output_tokens,
            budget_s,
            tbt_slo_s,
            r.policy[MARGIN],
        ):
            return False
    return True


def _least_late(w: World, k: int, now_s: float, input_tokens: float, output_tokens: float) -> int:
    """The row of any allowed pool that gives a first token soonest."""
    r = w.routing
    count = 0
    for index in range(r.pool_count[k]):
        p = r.pools[k, index]
        for member in range(r.member_count[p]):
            r.candidates[count] = r.members[p, member]
            count += 1
    return choose_least_late(r.candidates[:count], costs_of(w), load_of(w), now_s, input_tokens, output_tokens)

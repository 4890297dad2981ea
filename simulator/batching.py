"""Continuous batching as vLLM's V1 scheduler does it: pure functions over a struct of arrays.

A step first carries on with every running sequence (one token for a decode, the next chunk for a prompt), then admits
waiting ones, all within ``max_num_batched_tokens``; KV cache is taken in blocks as tokens come, and when none is free
the last sequence (or the least important one) is preempted and later recomputed from its first token.

The functions hold no state and use plain arithmetic and indexing only, so that one source runs interpreted over lists
(the emulated server, one step at a time) and compiled over NumPy arrays (virtual time, thousands of engines at once).
They never look at time beyond the arrival stored with a sequence, and know nothing of power.
"""

from collections.abc import MutableSequence
from typing import NamedTuple

Ints = MutableSequence[int]
Floats = MutableSequence[float]
Rows = MutableSequence[Ints]

NO_SLOT = -1


class EngineLimits(NamedTuple):
    """What one engine is started with; the names are vLLM's. Policy by priority or first come, first served."""

    kv_blocks: int  # blocks of KV cache beside the weights
    max_num_seqs: int = 256  # sequences in one batch
    max_num_batched_tokens: int = 2048  # tokens in one step: the prefill chunk beside the decodes
    block_tokens: int = 16  # tokens of one KV block
    by_priority: bool = False


class BatchState(NamedTuple):
    """Sequences (one entry a slot) and engines (one entry an engine); lists or NumPy arrays, changed in place."""

    # sequences, by slot
    input_tokens: Ints
    output_tokens: Ints
    computed_tokens: Ints  # tokens whose keys and values are in the cache
    generated_tokens: Ints
    scheduled_tokens: Ints  # tokens of the present step; 0 = sits it out
    blocks: Ints  # KV blocks held
    priority: Ints  # higher is more important
    arrival_s: Floats
    next_slot: Ints  # link of the waiting queue
    # engines; rows hold slots in order of admission
    running: Rows
    running_count: Ints
    waiting_head: Ints
    waiting_tail: Ints
    waiting_count: Ints
    free_blocks: Ints
    # what the last schedule() and complete() did, by engine
    emitted: Rows  # slots that got a token
    finished: Rows  # slots that got their last token
    preempted: Rows  # slots thrown back to the queue


class StepBatch(NamedTuple):
    """What one step computes: the arguments of ``energy.profile.step_time_s``, and how many were preempted for it."""

    prefill_tokens: int
    prefill_attention_tokens2: float  # token pairs: new x already computed + causal half of new x new
    decode_seqs: int
    context_tokens: int
    preempted: int


def enqueue(s: BatchState, e: int, slot: int, by_priority: bool) -> None:
    """Put a sequence into the waiting queue of engine ``e``: at the end, or behind its equals in importance."""
    after = s.waiting_tail[e]
    if by_priority:
        after = NO_SLOT
        candidate = s.waiting_head[e]
        while candidate != NO_SLOT and not _goes_before(s, slot, candidate):
            after = candidate
            candidate = s.next_slot[candidate]
    _link(s, e, slot, after)


def _goes_before(s: BatchState, slot: int, other: int) -> bool:
    if s.priority[slot] != s.priority[other]:
        return s.priority[slot] > s.priority[other]
    return s.arrival_s[slot] < s.arrival_s[other]


def _link(s: BatchState, e: int, slot: int, after: int) -> None:
    """Insert behind ``after``; ``NO_SLOT`` is the front."""
    if after == NO_SLOT:
        s.next_slot[slot] = s.waiting_head[e]
        s.waiting_head[e] = slot
    else:
        s.next_slot[slot] = s.next_slot[after]
        s.next_slot[after] = slot
    if s.next_slot[slot] == NO_SLOT:
        s.waiting_tail[e] = slot
    s.waiting_count[e] += 1


def _pop_waiting(s: BatchState, e: int) -> None:
    head = s.waiting_head[e]
    s.waiting_head[e] = s.next_slot[head]
    if s.waiting_head[e] == NO_SLOT:
        s.waiting_tail[e] = NO_SLOT
    s.waiting_count[e] -= 1


def unlink_waiting(s: BatchState, e: int, slot: int) -> bool:
    """Take one sequence out of the waiting queue; whether it was there."""
    before = NO_SLOT
    candidate = s.waiting_head[e]
    while candidate != NO_SLOT and candidate != slot:
        before = candidate
        candidate = s.next_slot[candidate]
    if candidate == NO_SLOT:
        return False
    if before == NO_SLOT:
        _pop_waiting(s, e)
        return True
    s.next_slot[before] = s.next_slot[slot]
    if s.waiting_tail[e] == slot:
        s.waiting_tail[e] = before
    s.waiting_count[e] -= 1
    return True


def schedule(s: BatchState, e: int, limits: EngineLimits) -> StepBatch:
    """Choose the tokens of the next step of engine ``e``: fills ``scheduled_tokens`` and ``preempted``."""
    row = s.running[e]
    budget = limits.max_num_batched_tokens
    preempted = 0
    position = 0
    while position < s.running_count[e]:
        slot = row[position]
        new = min(s.input_tokens[slot] + s.generated_tokens[slot] - s.computed_tokens[slot], budget)
        while new > 0 and not _take_blocks(s, e, slot, new, limits.block_tokens):
            victim_position = _victim(s, e, limits.by_priority)
            victim = row[victim_position]
            if victim_position < position:  # already in this step: its tokens go back
                budget += s.scheduled_tokens[victim]
                position -= 1
            _preempt(s, e, victim_position, limits.by_priority)
            s.preempted[e][preempted] = victim
            preempted += 1
            if victim == slot:
                new = -1
        if new >= 0:
            s.scheduled_tokens[slot] = new
            budget -= new
            position += 1
    if preempted == 0:
        _admit(s, e, limits, budget)
    return _sum_batch(s, e, preempted)


def _admit(s: BatchState, e: int, limits: EngineLimits, budget: int) -> None:
    """Move waiting sequences into the batch while tokens, places and KV blocks last."""
    row = s.running[e]
    while budget > 0 and s.waiting_count[e] > 0 and s.running_count[e] < limits.max_num_seqs:
        slot = s.waiting_head[e]
        new = min(s.input_tokens[slot] + s.generated_tokens[slot], budget)
        if not _take_blocks(s, e, slot, new, limits.block_tokens):
            return
        _pop_waiting(s, e)
        row[s.running_count[e]] = slot
        s.running_count[e] += 1
        s.scheduled_tokens[slot] = new
        budget -= new


def _take_blocks(s: BatchState, e: int, slot: int, new: int, block_tokens: int) -> bool:
    """Hold enough blocks for ``new`` more tokens; False, and nothing taken, if too few are free."""
    more = (s.computed_tokens[slot] + new + block_tokens - 1) // block_tokens - s.blocks[slot]
    if more <= 0:
        return True
    if more > s.free_blocks[e]:
        return False
    s.free_blocks[e] -= more
    s.blocks[slot] += more
    return True


def _victim(s: BatchState, e: int, by_priority: bool) -> int:
    """Position of the sequence to preempt: the last admitted, or the least important (of those, the latest)."""
    row = s.running[e]
    last = s.running_count[e] - 1
    if not by_priority:
        return last
    victim = last
    for position in range(last - 1, -1, -1):
        if _goes_before(s, row[victim], row[position]):
            victim = position
    return victim


def _preempt(s: BatchState, e: int, position: int, by_priority: bool) -> None:
    """Throw one sequence back to the front of the queue (or to its place by priority); its KV cache is lost."""
    slot = s.running[e][position]
    _remove_running(s, e, position)
    release(s, e, slot)
    s.computed_tokens[slot] = 0
    if by_priority:
        enqueue(s, e, slot, True)
    else:
        _link(s, e, slot, NO_SLOT)


def _remove_running(s: BatchState, e: int, position: int) -> None:
    row = s.running[e]
    s.running_count[e] -= 1
    for index in range(position, s.running_count[e]):
        row[index] = row[index + 1]


def release(s: BatchState, e: int, slot: int) -> None:
    """Give the KV blocks of a sequence back to engine ``e``."""
    s.free_blocks[e] += s.blocks[slot]
    s.blocks[slot] = 0
    s.scheduled_tokens[slot] = 0


def drop_running(s: BatchState, e: int, slot: int) -> bool:
    """Take one sequence out of the batch (aborted); whether it was there."""
    for position in range(s.running_count[e]):
        if s.running[e][position] == slot:
            _remove_running(s, e, position)
            release(s, e, slot)
            return True
    return False


def is_decoding(s: BatchState, slot: int) -> bool:
    """Whether all a sequence has left to compute is its newest token."""
    return (
        s.generated_tokens[slot] > 0 and s.computed_tokens[slot] + 1 == s.input_tokens[slot] + s.generated_tokens[slot]
    )


def _sum_batch(s: BatchState, e: int, preempted: int) -> StepBatch:
    row = s.running[e]
    prefill_tokens = 0
    attention_tokens2 = 0.0
    decode_seqs = 0
    context_tokens = 0
    for position in range(s.running_count[e]):
        slot = row[position]
        new = s.scheduled_tokens[slot]
        if new == 0:
            continue
        computed = s.computed_tokens[slot]
        if is_decoding(s, slot):
            decode_seqs += 1
            context_tokens += computed + 1
        else:
            prefill_tokens += new
            attention_tokens2 += new * (computed + 0.5 * new)
    return StepBatch(prefill_tokens, attention_tokens2, decode_seqs, context_tokens, preempted)


def complete(s: BatchState, e: int) -> tuple[int, int]:
    """Apply the scheduled step of engine ``e``; fills ``emitted`` and ``finished`` and returns how many of each.

    A sequence whose every token is computed gets one more; with its last token it leaves the batch and frees its
    blocks. The caller owns the slots of finished sequences afterwards.
    """
    row = s.running[e]
    emitted = 0
    finished = 0
    kept = 0
    for position in range(s.running_count[e]):
        slot = row[position]
        s.computed_tokens[slot] += s.scheduled_tokens[slot]
        if s.computed_tokens[slot] == s.input_tokens[slot] + s.generated_tokens[slot]:
            s.generated_tokens[slot] += 1
            s.emitted[e][emitted] = slot
            emitted += 1
            if s.generated_tokens[slot] == s.output_tokens[slot]:
                s.finished[e][finished] = slot
                finished += 1
                release(s, e, slot)
                continue
        row[kept] = slot
        kept += 1
    s.running_count[e] = kept
    return emitted, finished

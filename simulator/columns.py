"""The router's Costs and Load, as the compiled loop hands them to ``pools.scoring``: named tuples over the World."""

from pools.scoring import Costs, Load
from simulator.world import World


def costs_of(w: World) -> Costs:
    """What rows cost."""
    c = w.costs
    return Costs(
        c.kind,
        c.token_s,
        c.seq_s,
        c.attention_s,
        c.kv_s,
        c.prompt_j,
        c.output_j,
        c.attention_j,
        c.kv_j,
        c.step_j,
        c.chunk_tokens,
        c.max_seqs,
        c.kv_capacity_tokens,
    )


def load_of(w: World) -> Load:
    """What rows hold."""
    c = w.load
    return Load(
        c.in_flight,
        c.pending_tokens,
        c.prefill_done_s,
        c.context_tokens,
        c.reserved_tokens,
        c.prompt_share,
        c.tbt_limit_s,
        c.step_s,
        c.between_s,
        c.prompt_s,
        c.free_tokens,
    )

"""PeerLoad: what other gateways have on an instance, as they last said. Values only.

Each gateway counts what it sends; what it hears of the others is as old as their last report. Together they see what
one gateway would see, late by that.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pools.scoring import UNPROMISED_S


class PeerLoad(NamedTuple):
    """Sums over requests in flight; the columns of ``pools.scoring.Load`` of the same names."""

    in_flight: float = 0.0
    pending_tokens: float = 0.0
    context_tokens: float = 0.0
    reserved_tokens: float = 0.0
    prompt_share: float = 0.0
    tbt_limit_s: float = UNPROMISED_S  # the tightest of all


NOTHING = PeerLoad()


def together(gateways: Iterable[Mapping[str, PeerLoad]]) -> dict[str, PeerLoad]:
    """What several gateways have on each instance, in all."""
    total: dict[str, PeerLoad] = {}
    for loads in gateways:
        for instance_id, load in loads.items():
            known = total.get(instance_id, NOTHING)
            sums = PeerLoad(*(a + b for a, b in zip(known, load, strict=True)))
            total[instance_id] = sums._replace(tbt_limit_s=min(known.tbt_limit_s, load.tbt_limit_s))
    return total

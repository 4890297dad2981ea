"""clairvoyant_w: a lower bound on the power of any policy that keeps the SLOs. Pure.

Perfect knowledge of each slot's demand, changes for nothing, no reserve, fractions of instances (LP relaxation). What a
table cannot carry within the SLO it cannot buy: the bound holds for policies that meet the SLO, on that table.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from solver.candidates import Candidates
from solver.control import FloatArray
from solver.milp import lower_bound
from solver.problem import NodeRoom, PlanProblem, Shapes


def clairvoyant_w(
    candidates: Candidates, nodes: int, gpus_per_node: int, rates_rps: Iterable[FloatArray]
) -> Iterator[float]:
    """Least power for each slot's rates (K,); nan for a slot that the GPUs cannot carry at all.

    ``candidates`` should be made with every TP and clock, no headroom and loads up to 1.
    """
    c = candidates
    for rate in rates_rps:
        rate = np.asarray(rate, dtype=np.float64)
        problem = PlanProblem(
            demand_names=c.demand_names,
            pool_names=tuple(pool.name for pool in c.pools),
            rate_rps=rate,
            reserve_rps=rate,
            standby_rps=rate,
            work=c.work,
            group_pool=c.group_pool,
            group_shape=c.group_shape,
            group_peak=c.group_peak,
            point_group=c.point_group,
            point_capacity=c.point_capacity,
            point_power_w=c.point_power_w,
            group_idle_w=c.group_idle_w,
            shapes=Shapes.free(c.shape_tp),
            room=NodeRoom.whole(nodes, gpus_per_node, len(c.group_pool)),
            min_ready=np.zeros(len(c.pools)),
        )
        yield lower_bound(problem).power_w

"""Why no plan holds: the rows that cannot be met, by name and by how much. Pure.

The program is made elastic, each row that states a limit may be broken at a price, and what is broken at the least
price is the reason: rather a shortage of GPUs than a demand left out, unless nobody may serve the demand at all.
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csc_array, hstack

from solver.control import FloatArray, IntArray
from solver.formulation import formulate
from solver.problem import PlanProblem
from solver.rows import LinearProgram

_PRICES = {"demand": 1e4, "min_ready": 1e2, "pool_gpus": 1.0, "nodes": 1.0, "power": 1e-3}
_ENOUGH = 1e-6
_BRANCH_NODES = 200


def explain(problem: PlanProblem) -> str:
    """The rows that cannot be met, as ``nodes[TP8]: 2 short; power: 350 short``."""
    program = formulate(replace(problem, unserved_w_per_rps=float("inf"))).program
    rows = np.array([r for name, block in program.row_names if name in _PRICES for r in block.index], dtype=np.int64)
    price = np.array([_PRICES[program.row_name(int(r))[0]] for r in rows])
    sign = np.where(np.isfinite(program.row_upper[rows]), -1.0, 1.0)
    # a demand is an equality: what is missing is added; a row with an upper limit gives way upwards
    sign[np.isfinite(program.row_lower[rows])] = 1.0
    sign[np.isin(rows, _pool_gpu_rows(program))] = -1.0
    count = len(rows)
    slack = csc_array((sign, (rows, np.arange(count))), shape=(program.matrix.shape[0], count))
    result = milp(
        np.concatenate([np.zeros(len(program.cost)), price]),
        integrality=np.concatenate([program.integrality, np.zeros(count)]),
        bounds=Bounds(
            np.concatenate([program.lower, np.zeros(count)]),
            np.concatenate([program.upper, np.full(count, np.inf)]),
        ),
        constraints=LinearConstraint(hstack([program.matrix, slack]), program.row_lower, program.row_upper),
        options={"mip_rel_gap": 1e-2, "node_limit": _BRANCH_NODES},
    )
    if result.x is None:
        return "no single limit explains it: bounds of pinned instances contradict each other"
    short: FloatArray = result.x[len(program.cost) :]
    broken = [(program.row_name(int(r)), float(s)) for r, s in zip(rows, short, strict=True) if s > _ENOUGH]
    return "; ".join(_sentence(problem, name, place, amount) for (name, place), amount in broken)


def _pool_gpu_rows(program: LinearProgram) -> IntArray:
    """Rows with a lower and an upper limit of which the upper one is what runs short."""
    blocks = [block.index for name, block in program.row_names if name == "pool_gpus"]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)


def _sentence(problem: PlanProblem, row: str, place: int, amount: float) -> str:
    if row == "demand":
        name = problem.demand_names[place]
        served = np.any(np.isfinite(problem.work[place]))
        return f"demand[{name}]: {'not enough room to serve it' if served else 'no group may serve it'}"
    if row == "nodes":
        return f"nodes[TP{np.unique(problem.shapes.tp)[place]}]: {amount:.3g} instances short"
    if row == "pool_gpus":
        return f"pool_gpus[{problem.pool_names[place]}]: {amount:.3g} GPUs short"
    if row == "min_ready":
        return f"min_ready[{problem.pool_names[place]}]: {amount:.3g} instances short"
    return f"power: {amount:.4g} W short"

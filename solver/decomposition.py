"""Solving many models apart and proving how good that is. Pure.

Models share nothing but nodes and the power budget. The rows that couple them get prices, the duals of the linear
relaxation; each model is then planned alone against these prices, and the parts together are priced exactly. By
Lagrangian duality the parts' bounds plus what the coupling itself can gain at these prices bound the whole problem from
below, so the gap is as proven as that of one joint solve, at a time that grows with the number of models only.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csc_array, csr_array, vstack
from scipy.sparse.csgraph import connected_components

from solver.control import BoolArray, FloatArray, IntArray
from solver.rows import LinearProgram

COUPLING_ROWS = frozenset({"nodes", "power", "switched"})
_PART_GAP = 0.5  # share of the allowed gap that each part may take; the rest is for the coupling: nodes are whole


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Which columns and rows belong to which part; -1: they couple parts."""

    count: int
    column: IntArray
    row: IntArray


def parts_of(program: LinearProgram) -> Parts:
    """The independent parts of a program but for its coupling rows."""
    rows, columns = program.matrix.shape
    couples = _coupling(program)
    inner = program.matrix.tocsr()[~couples]
    links = inner.tocoo()
    size = inner.shape[0] + columns
    graph = csr_array((np.ones(links.nnz), (links.row, inner.shape[0] + links.col)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1]
    row = np.full(rows, -1, dtype=np.int64)
    row[~couples] = labels[: inner.shape[0]]
    column = labels[inner.shape[0] :].astype(np.int64)
    column[~np.isin(column, row)] = -1  # a column of coupling rows alone
    kept, column = _renumbered(column)
    lookup = dict(zip(kept.tolist(), range(len(kept)), strict=True))
    row = np.array([lookup.get(int(r), -1) for r in row], dtype=np.int64)
    return Parts(len(kept), column, row)


def solve_in_parts(program: LinearProgram, parts: Parts, gap: float, branch_nodes: int) -> OptimizeResult | None:
    """A solution like ``scipy.optimize.milp``'s, with its bound; None where the parts do not fit together."""
    prices = _prices(program)
    if prices is None:
        return None
    coupling = program.matrix.tocsr()[_coupling(program)]
    priced = program.cost - coupling.T @ prices
    x = np.zeros(len(program.cost))
    limit = np.where(prices > 0.0, program.row_lower[_coupling(program)], program.row_upper[_coupling(program)])
    bound = float(prices[prices != 0.0] @ limit[prices != 0.0])
    alone = np.flatnonzero(parts.column < 0)
    slack = np.where(np.abs(priced[alone]) < 1e-7, 0.0, priced[alone])
    worst = np.where(slack > 0.0, program.lower[alone], program.upper[alone])
    bound += float(np.sum(slack[slack != 0.0] * worst[slack != 0.0]))
    branched = 0
    by_column = [np.flatnonzero(parts.column == part) for part in range(parts.count)]
    by_row = [np.flatnonzero(parts.row == part) for part in range(parts.count)]
    matrix = program.matrix.tocsr()

    def alone_at_these_prices(part: int) -> OptimizeResult:
        columns, rows = by_column[part], by_row[part]
        return milp(
            priced[columns],
            integrality=program.integrality[columns],
            bounds=Bounds(program.lower[columns], program.upper[columns]),
            constraints=LinearConstraint(
                csc_array(matrix[rows])[:, columns], program.row_lower[rows], program.row_upper[rows]
            ),
            options={"mip_rel_gap": _PART_GAP * gap, "node_limit": branch_nodes, "presolve": False},
        )

    # HiGHS runs without the interpreter's lock; parts know nothing of one another, so their order cannot show
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(alone_at_these_prices, range(parts.count)))
    for columns, result in zip(by_column, results, strict=True):
        if result.x is None:
            return None
        x[columns] = np.where(program.integrality[columns] > 0, np.rint(result.x), result.x)
        bound += float(result.mip_dual_bound if result.mip_dual_bound is not None else result.fun)
        branched += int(result.mip_node_count or 0)
    return _together(program, parts, x, bound, branched, gap)


def _together(
    program: LinearProgram, parts: Parts, x: FloatArray, bound: float, branched: int, gap: float
) -> OptimizeResult | None:
    """Fix the whole numbers of the parts and let the rest of the program follow."""
    fixed = (parts.column >= 0) & (program.integrality > 0)
    lower = np.where(fixed, x, program.lower)
    upper = np.where(fixed, x, program.upper)
    result = milp(
        program.cost,
        integrality=np.where(fixed, 0.0, program.integrality),
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(program.matrix, program.row_lower, program.row_upper),
        options={"mip_rel_gap": 0.1 * gap},
    )
    if result.x is None:
        return None
    close = result.fun - bound <= gap * abs(result.fun)
    result.status = 0 if close else 1
    result.mip_dual_bound, result.mip_node_count = min(bound, result.fun), branched
    return result


def _coupling(program: LinearProgram) -> BoolArray:
    """(rows,) True for rows that couple parts."""
    couples = np.zeros(program.matrix.shape[0], dtype=np.bool_)
    for name, block in program.row_names:
        couples[block.slice] = name in COUPLING_ROWS
    return couples


def _renumbered(labels: IntArray) -> tuple[IntArray, IntArray]:
    """The labels there are but -1, and the labels counted from 0 in that order."""
    kept = np.unique(labels[labels >= 0])
    return kept, np.where(labels >= 0, np.searchsorted(kept, labels), -1)


def _prices(program: LinearProgram) -> FloatArray | None:
    """Duals of the coupling rows in the linear relaxation; None where it has no solution."""
    matrix = program.matrix.tocsr()
    equal = program.row_lower == program.row_upper
    above = np.isfinite(program.row_upper) & ~equal
    below = np.isfinite(program.row_lower) & ~equal
    upper_rows, lower_rows, equal_rows = (np.flatnonzero(mask) for mask in (above, below, equal))
    result = linprog(
        program.cost,
        A_ub=vstack([matrix[upper_rows], -matrix[lower_rows]]),
        b_ub=np.concatenate([program.row_upper[upper_rows], -program.row_lower[lower_rows]]),
        A_eq=matrix[equal_rows],
        b_eq=program.row_upper[equal_rows],
        bounds=np.stack([program.lower, program.upper], axis=1),
        method="highs",
    )
    if result.x is None:
        return None
    duals = np.zeros(matrix.shape[0])
    duals[upper_rows] += result.ineqlin.marginals[: len(upper_rows)]
    duals[lower_rows] -= result.ineqlin.marginals[len(upper_rows) :]
    duals[equal_rows] += result.eqlin.marginals
    prices: FloatArray = duals[_coupling(program)]
    return prices

"""Random plan problems small enough to be solved by trying everything, and that trying."""

from dataclasses import replace

import numpy as np

from solver.problem import NodeRoom, PlanProblem, Shapes

# two pools: "s" serves demand 0 with TP1 or TP2, "l" serves both demands with TP2 or TP4
GROUP_POOL = np.array([0, 0, 1, 1])
GROUP_SHAPE = np.array([0, 1, 1, 2])
TPS = np.array([1, 2, 4])
ALLOWED = np.array([[True, True, True, True], [False, False, True, True]])


def random_problem(seed, nodes=(4, 2), budget=False, changes=True):
    rng = np.random.default_rng(seed)
    groups = len(GROUP_POOL)
    peak = TPS[GROUP_SHAPE] ** 0.9 * rng.uniform(0.8, 1.2, groups)
    point_group = np.repeat(np.arange(groups), 2)
    capacity = peak[point_group] * np.tile([0.55, 1.0], groups) * rng.uniform(0.9, 1.0, 2 * groups)
    power = TPS[GROUP_SHAPE][point_group] * np.tile([250.0, 600.0], groups) * rng.uniform(0.8, 1.2, 2 * groups)
    rate = rng.uniform(0.05, 1.4, 2)
    work = np.where(ALLOWED, rng.uniform(0.5, 1.5, (2, groups)), np.inf)
    none = np.zeros(0, dtype=np.int64)
    shapes = Shapes(
        tp=TPS,
        ready=rng.integers(0, 3, 3).astype(float) if changes else np.zeros(3),
        parked=np.zeros(3),
        start_w=rng.uniform(0.0, 300.0, 3) * changes,
        stop_w=rng.uniform(0.0, 60.0, 3) * changes,
        wake_w=np.zeros(3),
        parked_w=np.full(3, np.inf),
        reshard_from=none,
        reshard_to=none,
        reshard_w_per_gpu=np.zeros(0),
    )
    gpus = np.array(nodes)
    return PlanProblem(
        demand_names=("S", "L"),
        pool_names=("s", "l"),
        rate_rps=rate,
        reserve_rps=rate * 1.15,
        standby_rps=rate * 1.15,
        work=work,
        group_pool=GROUP_POOL,
        group_shape=GROUP_SHAPE,
        group_peak=peak,
        point_group=point_group,
        point_capacity=capacity,
        point_power_w=power,
        group_idle_w=TPS[GROUP_SHAPE] * rng.uniform(80.0, 120.0, groups),
        shapes=shapes,
        room=NodeRoom(gpus, gpus, np.zeros(groups, dtype=np.int64)),
        min_ready=np.zeros(2),
        power_budget_w=float(rng.uniform(900.0, 2500.0)) if budget else float("inf"),
        integral_points=True,
    )


def fits(sizes, nodes):
    """Whether instances of these sizes can be laid into nodes, by trying every way."""
    sizes = sorted(sizes, reverse=True)

    def place(at, free):
        if at == len(sizes):
            return True
        tried = set()
        for n, room in enumerate(free):
            if room >= sizes[at] and room not in tried:
                tried.add(room)
                if place(at + 1, (*free[:n], room - sizes[at], *free[n + 1 :])):
                    return True
        return False

    return place(0, tuple(nodes))


def best_by_trying(problem):
    """Least objective over every whole-number plan, or None. Written from the problem's words, not from its rows."""
    groups = np.arange(len(problem.group_pool))
    every = replace(  # an instance may also be given nothing
        problem,
        point_group=np.concatenate([problem.point_group, groups]),
        point_capacity=np.concatenate([problem.point_capacity, np.zeros(len(groups))]),
        point_power_w=np.concatenate([problem.point_power_w, problem.group_idle_w]),
    )
    tp = every.group_tp[every.point_group]
    best = None
    for counts in _counts(tp.tolist(), int(problem.room.free.sum())):
        cost = _cost(every, np.array(counts))
        if (best is not None and cost >= best) or not _holds(every, np.array(counts), tp):
            continue
        best = cost
    return best


def _counts(sizes, gpus):
    """Every way to have instances of these sizes on so many GPUs."""
    if not sizes:
        yield ()
        return
    for n in range(gpus // sizes[0] + 1):
        for rest in _counts(sizes[1:], gpus - n * sizes[0]):
            yield (n, *rest)


def _cost(problem, counts):
    ready = np.bincount(problem.point_group, counts, len(problem.group_pool))
    per_shape = np.bincount(problem.group_shape, ready, len(problem.shapes.tp))
    more = per_shape - problem.shapes.ready
    changes = problem.shapes.start_w @ np.maximum(more, 0) + problem.shapes.stop_w @ np.maximum(-more, 0)
    return float(counts @ problem.point_power_w + changes)


def _holds(problem, counts, tp):
    if counts @ problem.point_power_w > problem.power_budget_w:
        return False
    ready = np.bincount(problem.point_group, counts, len(problem.group_pool))
    capacity = np.bincount(problem.point_group, counts * problem.point_capacity, len(problem.group_pool))
    peak = ready * problem.group_peak
    # demand 1 goes to groups 2 and 3 in some split; then demand 0 takes what it can of every group
    splits = [1.0] if not ready[3] else [0.0] if not ready[2] else _corner_splits(problem, capacity, peak)
    sizes = np.repeat(tp, counts)
    return any(_demand_0_fits(problem, capacity, peak, split) for split in splits) and fits(
        sizes.tolist(), problem.room.free.tolist()
    )


def _corner_splits(problem, capacity, peak):
    """Splits of demand 1 at which what it leaves for demand 0 can be most: piecewise linear, so the corners suffice."""
    rate, reserve, work = problem.rate_rps[1], problem.reserve_rps[1], problem.work[1]
    corners = [0.0, 1.0]
    corners += [capacity[2] / (rate * work[2]), peak[2] / (reserve * work[2])]
    corners += [1 - capacity[3] / (rate * work[3]), 1 - peak[3] / (reserve * work[3])]
    # where load and reserve of a group bind equally
    for g, sign in ((2, 1.0), (3, -1.0)):
        slope = work[g] * (rate / problem.rate_rps[0] - reserve / problem.reserve_rps[0])
        if abs(slope) > 1e-12:
            x = (capacity[g] / problem.rate_rps[0] - peak[g] / problem.reserve_rps[0]) / slope
            corners.append(x if sign > 0 else 1 - x)
    return [c for c in corners if 0.0 <= c <= 1.0]


def _demand_0_fits(problem, capacity, peak, split):
    taken = np.array([0.0, 0.0, split, 1.0 - split])
    work_1 = np.where(taken > 0, problem.work[1], 0.0)
    left = capacity - taken * problem.rate_rps[1] * work_1
    left_peak = peak - taken * problem.reserve_rps[1] * work_1
    if np.any(left < -1e-9) or np.any(left_peak < -1e-9):
        return False
    most = np.minimum(
        left / (problem.rate_rps[0] * problem.work[0]), left_peak / (problem.reserve_rps[0] * problem.work[0])
    )
    return most.clip(0).sum() >= 1.0 - 1e-9

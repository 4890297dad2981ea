"""A small capacity table with the shape of real ones, and cluster states made by hand."""

import numpy as np

from energy.capacity import CapacityTable, ClassLoad
from pools.classes import REQUEST_CLASSES, RequestClass
from pools.instances import InstanceState
from pools.view import PoolView
from solver.control import STATE_CODE, ClusterState, Demand, InstanceViews, Observation

TPS = (2, 4, 8)
CLOCKS = (800, 1200, 1600, 1980)
LOADS = (0.0, 0.25, 0.5, 0.75, 1.0)


def table():
    """Capacity rises with TP and clock, less than in proportion; power rises steeply with the clock."""
    work = np.array([1 + 2 * k.input_size**2 + 2 * k.output_size for k in REQUEST_CLASSES], dtype=float)
    tp = np.array(TPS, dtype=float)[:, None, None]
    clock = np.array(CLOCKS, dtype=float)[None, :, None] / 1980.0
    max_rate = 12.0 * tp**0.85 * clock**0.7 / work
    load = np.array(LOADS)
    idle = tp * (70.0 + 50.0 * clock)
    full = tp * (120.0 + 330.0 * clock**2.2) * np.ones_like(work)
    power = idle[..., None] + (full - idle)[..., None] * load**0.4
    lone = 0.02 * work / (tp * clock)
    flat = np.broadcast_to(lone[..., None], power.shape)
    classes = tuple(ClassLoad(k.name, 100.0, 100.0, (0.25, 0.4, 2.0)[k.input_size], 0.1) for k in REQUEST_CLASSES)
    return CapacityTable(
        "small", "by hand", TPS, CLOCKS, classes, LOADS, max_rate, flat, 2 * flat, flat, flat, flat, power
    )


def nine_pools(model="m"):
    return tuple(PoolView(k.name, model, k) for k in REQUEST_CLASSES)


def one_pool(model="m"):
    return (PoolView("all", model, RequestClass.LL),)


def views(rows):
    """Instances from ``dict(id, pool, node, tp, state, clock, rate, slack, late, ...)``; all but id may lack."""
    n = len(rows)
    rate = np.zeros((n, 9))
    for i, row in enumerate(rows):
        for request_class, value in row.get("rate", {}).items():
            rate[i, request_class] = value

    def ints(name, default):
        return np.array([row.get(name, default) for row in rows], dtype=np.int64)

    def floats(name, default):
        return np.array([row.get(name, default) for row in rows], dtype=np.float64)

    return InstanceViews(
        ids=tuple(row["id"] for row in rows),
        pool=ints("pool", 0),
        node=ints("node", 0),
        tp=ints("tp", 2),
        state=np.array([STATE_CODE[row.get("state", InstanceState.READY)] for row in rows], dtype=np.int64),
        sm_clock_mhz=ints("clock", 1980),
        ready_at_s=floats("ready_at", float("-inf")),
        class_rate_rps=rate,
        running=floats("running", 0.0),
        waiting=floats("waiting", 0.0),
        waiting_tokens=floats("waiting_tokens", 0.0),
        context_tokens=floats("context_tokens", 0.0),
        slo_slack=floats("slack", float("nan")),
        late_rps=floats("late", 0.0),
        power_w=floats("power", float("nan")),
    )


def cluster(rows, pools, nodes=2, gpus=8, usable=None, at_s=0.0):
    return ClusterState(
        at_s=at_s,
        pools=tuple(p.name for p in pools),
        node_names=tuple(f"n{i}" for i in range(nodes)),
        node_gpus=np.full(nodes, gpus, dtype=np.int64),
        node_usable=np.ones(nodes, dtype=np.bool_) if usable is None else np.array(usable),
        instances=views(rows),
    )


def demand(requests, window_s=5.0):
    zero = np.zeros(len(requests))
    return Demand(window_s, np.asarray(requests, dtype=float), zero, zero, zero)


def observation(now_s, state, requests, window_s=5.0):
    return Observation(now_s, state, demand(requests, window_s))

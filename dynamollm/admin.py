"""The operator's routes: the cluster as it is (``/admin/status``) and what was decided, and why (``/admin/decisions``).

Values only, as JSON; `dynamollm status` and `dynamollm explain` print them. Times are seconds before now, for a reader
elsewhere has another clock. ``/admin/gpus/metrics`` is Prometheus' text, for boards and load generators.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from enum import Enum

import msgspec
from fastapi import APIRouter, Response

from dynamollm.commanding import Commanding
from dynamollm.control_loop import TickRecord
from dynamollm.counterfactual import Counterfactual
from dynamollm.errors import UserError
from dynamollm.operations import OperationRecord
from energy.dcgm import dcgm_text
from proxy.errors import ApiError
from solver.control import Action, Observation, Reshard, Route

Json = dict[str, object]


def admin_routes(in_command: Callable[[], Commanding], reload: Callable[[], list[str]] | None = None) -> APIRouter:
    """The routes; ``proxy.app`` puts them under ``/admin``, behind the API keys.

    ``in_command`` tells who commands now; it may raise ``ApiError`` where nobody here does. ``reload`` follows the
    configuration as it is now and says what has changed; None: not while it runs.
    """
    routes = APIRouter()

    @routes.get("/status")
    async def status() -> Json:
        """Pools, instances, their load, SLO slack and power."""
        return describe_cluster(in_command())

    @routes.get("/decisions")
    async def decisions(last: int = 20) -> Json:
        """The last ticks that decided something, and what became of their actions."""
        application = in_command()
        now_s = application.clock()
        ticks = list(application.control.decisions)[-last:]
        operations = list(application.operations.records)[-last:]
        return {
            "ticks": [describe_tick(record, now_s) for record in ticks],
            "operations": [describe_operation(record, now_s) for record in operations],
        }

    @routes.get("/energy")
    async def energy(since_s: float = 3600.0) -> Response:
        """What requests, idle GPUs and transitions took since then; `dynamollm report` prints it."""
        application = in_command()
        window = application.ledger.window(since_s, application.clock())
        return Response(msgspec.json.encode(window), media_type="application/json")

    @routes.get("/gpus/metrics")
    async def gpus() -> Response:
        """What every GPU read last, under DCGM's names: for boards, and for load generators that measure energy."""
        metering = in_command().metering
        return Response(dcgm_text(metering.readings() if metering else ()), media_type="text/plain; version=0.0.4")

    if reload is not None:

        @routes.post("/reload")
        async def follow() -> Json:
            """Read the configuration anew: another policy, other settings of the controller, other profiles."""
            try:
                return {"changed": reload()}
            except UserError as error:
                raise ApiError(409, str(error), "configuration_refused") from None

    return routes


def describe_cluster(application: Commanding) -> Json:
    """The cluster now; load is the router's own count, slack and power those of the controller's last look."""
    deployment, router, control = application.deployment, application.router, application.control
    seen = _seen(control.observation)
    instances = [
        {
            "id": i.id,
            "pool": i.pool,
            "state": i.state.value,
            "tp": i.shape.tp,
            "sm_clock_mhz": i.sm_clock_mhz,
            "gpus": [f"{gpu.node}:{gpu.index}" for gpu in i.gpus],
            "url": i.url,
            "in_flight": router.in_flight(i.id),
            **seen.get(i.id, {"slo_slack": None, "power_w": None, "rate_rps": None}),
        }
        for i in deployment.instances.values()
    ]
    placement = deployment.placement
    return {
        "policy": deployment.settings.controller.policy,
        "pools": [{"name": p.name, "model": p.model, "class": p.request_class} for p in deployment.settings.pools],
        "instances": instances,
        "gpus": deployment.gpus,
        "gpus_free": sum(placement.free_gpus(node) for node in placement.nodes),
        "queued": router.queue.depth,
        "metered_j": application.ledger.metered_j,
        "counterfactual": describe_savings(application.counterfactual),
        "operations_under_way": application.operations.busy,
        "ticks": control.ticks,
    }


def describe_savings(counterfactual: Counterfactual | None) -> list[Json]:
    """What each other policy would have used for the same requests, and so what was saved; nothing while unknown."""
    return [
        {
            "policy": c.policy,
            "seconds": round(c.seconds, 1),
            "metered_j": _number(c.metered_j),
            "energy_j": _number(c.energy_j),
            "saved_j": _number(c.saved_j),
            "band_j": _number(c.band_j),
        }
        for c in (counterfactual.comparisons if counterfactual else ())
    ]


def _seen(observation: Observation | None) -> dict[str, Json]:
    if observation is None:
        return {}
    views = observation.cluster.instances
    return {
        instance_id: {
            "slo_slack": _number(views.slo_slack[i]),
            "power_w": _number(views.power_w[i]),
            "rate_rps": _number(views.class_rate_rps[i].sum()),
        }
        for i, instance_id in enumerate(views.ids)
    }


def describe_tick(record: TickRecord, now_s: float) -> Json:
    """One tick: why, in words and numbers, and what was ordered."""
    return {
        "ago_s": round(now_s - record.at_s, 3),
        "took_s": round(record.took_s, 4),
        "why": [
            {"topic": d.topic, "why": d.why, "numbers": {name: _number(value) for name, value in d.numbers.items()}}
            for d in record.diagnostics
        ],
        "actions": [describe_action(action) for action in record.actions],
    }


def describe_operation(record: OperationRecord, now_s: float) -> Json:
    """One action that has ended."""
    return {
        "ago_s": round(now_s - record.ended_s, 3),
        "took_s": round(record.ended_s - record.began_s, 3),
        "action": describe_action(record.action),
        "outcome": record.outcome.value,
        "reason": record.reason,
    }


def describe_action(action: Action) -> Json:
    """An action's kind and what it says; routes as shares by pool."""
    if isinstance(action, Route):
        share = action.pool_share.sum(axis=0)
        told: Json = {"shares": {p: round(float(s), 3) for p, s in zip(action.pools, share, strict=True) if s > 0}}
    elif isinstance(action, Reshard):
        told = {"retire": list(action.retire), "create": [describe_action(order) for order in action.create]}
    else:
        hidden = {"deadline_s", "plan", "not_before_s", "why"}
        values = ((f.name, getattr(action, f.name)) for f in fields(action) if f.name not in hidden)
        told = {name: value.value if isinstance(value, Enum) else value for name, value in values}
    return {"kind": type(action).__name__, "plan": list(action.plan), "why": action.why, **told}


def _number(value: float) -> float | None:
    """Four significant digits; None for what JSON cannot say."""
    return float(f"{value:.4g}") if math.isfinite(value) else None

"""RunResult: what one policy did with one workload, as numbers a table and a plot can be made of. Values only."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pools.classes import REQUEST_CLASSES
from simulator.histograms import quantile_s
from simulator.world import Ledger

JOULES_PER_WH = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Samples over time, one row a sample."""

    at_s: Any  # (S,)
    power_w: Any  # (S,) mean since the sample before, whole cluster
    rate_rps: Any  # (S,) requests that arrived since the sample before, per second
    gpus_on: Any  # (S,) GPUs of nodes that are on
    gpus_by_tp: dict[int, Any]  # GPUs of instances that may serve, by TP
    clock_mhz: Any  # (S,) mean SM clock of those, weighted by GPUs


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """One run. Energies in joules of GPUs; all requests that arrived are finished or rejected."""

    policy: str
    workload: str
    profile: str
    gpus: int
    seed: int
    horizon_s: float
    ledger: Ledger
    energy_by_kind_j: dict[str, float]  # prefill, decode, idle, boot, transition, parked, free
    gpu_s: float  # GPUs of nodes that are on, over time: what is paid for
    busy_gpu_s: float  # GPUs computing
    changes: dict[str, int]
    series: Series
    co2_g: float
    cost_usd: float
    wall_s: float
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def energy_j(self) -> float:
        """All of it."""
        return sum(self.energy_by_kind_j.values())

    @property
    def requests(self) -> int:
        """How many arrived."""
        return int(self.ledger.arrived.sum())

    @property
    def finished(self) -> int:
        """How many were answered to the end."""
        return int(self.ledger.finished.sum())

    @property
    def slo_attainment(self) -> float:
        """Share of all that arrived whose TTFT and whose mean time between tokens both were within their SLO."""
        return float(self.ledger.within_slo.sum()) / max(self.requests, 1)

    def quantiles_s(self, of: str, q: float) -> dict[str, float]:
        """A quantile of ``ttft``, ``tbt`` (every gap between tokens) or ``tpot`` (a request's mean gap) by class."""
        counts = getattr(self.ledger, of)
        by_class = {c.name: quantile_s(counts[c], q) for c in REQUEST_CLASSES if counts[c].sum()}
        return {**by_class, "all": quantile_s(counts.sum(axis=0), q)}

    def as_json(self) -> dict[str, Any]:
        """The documented fields of ``dynamollm simulate --json``."""
        outputs = int(self.ledger.output_tokens.sum())
        return {
            "policy": self.policy,
            "workload": self.workload,
            "profile": self.profile,
            "gpus": self.gpus,
            "seed": self.seed,
            "requests": self.requests,
            "finished": self.finished,
            "rejected": int(self.ledger.rejected.sum()),
            "horizon_s": self.horizon_s,
            "energy_j": self.energy_j,
            "energy_wh": self.energy_j / JOULES_PER_WH,
            "energy_by_kind_j": dict(self.energy_by_kind_j),
            "energy_per_request_j": self.energy_j / max(self.finished, 1),
            "energy_per_output_token_j": self.energy_j / max(outputs, 1),
            "gpu_hours": self.gpu_s / 3600.0,
            "busy_gpu_hours": self.busy_gpu_s / 3600.0,
            "mean_gpus": self.gpu_s / self.horizon_s if self.horizon_s > 0 else 0.0,
            "cost_usd": self.cost_usd,
            "co2_g": self.co2_g,
            "slo_attainment": self.slo_attainment,
            "ttft_attainment": float(self.ledger.within_ttft.sum()) / max(self.requests, 1),
            "tbt_attainment": float(self.ledger.within_tbt.sum()) / max(self.requests, 1),
            "ttft_p50_s": self.quantiles_s("ttft", 0.5),
            "ttft_p99_s": self.quantiles_s("ttft", 0.99),
            "tbt_p50_s": self.quantiles_s("tbt", 0.5),
            "tbt_p99_s": self.quantiles_s("tbt", 0.99),
            "tpot_p99_s": self.quantiles_s("tpot", 0.99),
            "preemptions": int(self.ledger.preempted[0]),
            "power_p50_w": _quantile(self.series.power_w, 0.5),
            "power_p99_w": _quantile(self.series.power_w, 0.99),
            "reconfigurations": sum(
                self.changes[kind] for kind in ("scale_out", "scale_in", "reshard", "park", "wake")
            ),
            "changes": dict(self.changes),
            "wall_s": self.wall_s,
            "notes": list(self.notes),
        }


def _quantile(values: Any, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")

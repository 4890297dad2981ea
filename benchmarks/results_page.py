"""docs/results.md from the stored runs: our numbers beside the paper's, and where every joule goes.

Numbers come from the files under benchmarks/results/ alone; what is said about them stands in
benchmarks/results_notes.md and is put in front.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulation_report import read_json, write_whole

NOTES = Path(__file__).resolve().parent / "results_notes.md"
BASELINE = "single-pool"
LEAST_ATTAINMENT = 0.99


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper reports against single-pool, and what we set out for; per cent of energy."""

    title: str
    paper: dict[str, str]
    target: str


CLAIMS = {
    "conv-1h": Claim(
        "1 h Conversation, 12 servers",
        {
            "multi-pool": "+20",
            "scale-inst": "-4.1 (v1), -2 (HPCA)",
            "scale-shard": "-7 (v1), -6 (HPCA)",
            "scale-freq": "-19",
            "dynamollm-paper": "-35",
        },
        "-50",
    ),
    "conv-1h-learned": Claim("1 h Conversation, 12 servers, output lengths learnt from cold", {}, ""),
    "code-day": Claim("24 h Coding-like, 12 servers", {"dynamollm-paper": "-42"}, "-55"),
    "code-week": Claim("1 week Coding-like, 40 servers", {"dynamollm-paper": "-56"}, "-65"),
    "conv-week": Claim("1 week ServeGen m-large, 40 servers", {"dynamollm-paper": "-47 (Conversation)"}, ""),
    "poisson-low": Claim("Poisson, low load", {"dynamollm-paper": "-51 (v1), -57 (HPCA)"}, "-60"),
    "poisson-medium": Claim("Poisson, medium load", {"dynamollm-paper": "-40 (v1), -42 (HPCA)"}, "-50"),
    "poisson-high": Claim("Poisson, high load", {"dynamollm-paper": "-23.4 (v1), -15 (HPCA)"}, "-30"),
}
POLICY_ORDER = (
    "single-pool",
    "multi-pool",
    "scale-inst",
    "scale-shard",
    "scale-freq",
    "packing",
    "dynamollm-paper",
    "dynamollm",
)
KINDS = ("prefill", "decode", "idle", "boot", "transition", "parked", "free")


def write_page(results: Path, page: Path, experiments: Sequence[str], profiles: Sequence[str]) -> None:
    """Write the page from whatever runs there are."""
    parts = [
        NOTES.read_text(encoding="utf-8").rstrip().replace("@@SUMMARY@@", _summary(results, experiments, profiles))
    ]
    for experiment in experiments:
        for profile in profiles:
            runs = _runs(results / experiment, profile)
            if BASELINE in runs:
                parts.append(_section(experiment, profile, runs))
    write_whole(page, "\n\n".join(parts) + "\n")


def _summary(results: Path, experiments: Sequence[str], profiles: Sequence[str]) -> str:
    """One row an experiment: change against single-pool of the better dynamollm that keeps 99 % within SLO."""
    lines = []
    for experiment in experiments:
        cells = [_best(_runs(results / experiment, profile)) for profile in profiles]
        if any(cells):
            lines.append(f"| {CLAIMS[experiment].title} | {CLAIMS[experiment].target or '-'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(runs: dict[str, dict[str, Any]]) -> str:
    base = runs.get(BASELINE)
    good = [r for p, r in runs.items() if p.startswith("dynamollm") and r["slo_attainment"] >= LEAST_ATTAINMENT]
    if base is None or not good:
        return ""
    best = min(good, key=lambda run: float(run["energy_j"]))
    share = _share(best["slo_attainment"])
    return f"{_change(best['energy_j'], base['energy_j'])} ({best['policy']}, {share} % in SLO)"


def _runs(folder: Path, profile: str) -> dict[str, dict[str, Any]]:
    """The stored runs of one experiment on one profile, by policy; the newest calibration's only."""
    found = {}
    for path in sorted(folder.glob(f"*--{profile}--*.json"), key=lambda p: p.stat().st_mtime):
        run = read_json(path)
        found[str(run["policy"])] = run
    return {policy: found[policy] for policy in (*POLICY_ORDER, "clairvoyant") if policy in found}


def _section(experiment: str, profile: str, runs: dict[str, dict[str, Any]]) -> str:
    claim = CLAIMS[experiment]
    base = runs[BASELINE]
    bound = runs.get("clairvoyant")
    settings = base["settings"]
    head = (
        f"## {claim.title}: {profile}\n\n"
        f"Trace `{settings['trace']}` at {settings['rate_scale']:g} times its rate, {base['requests']:,} requests; "
        f"seed {base['seed']}. Single-pool keeps {_share(base['slo_attainment'])} % within SLO on "
        f"{base['gpus'] // 8} servers"
        f"{_with_one_less(settings)}. Aim against single-pool: {claim.target or 'none set'} %."
    )
    return "\n\n".join((head, _energy_table(claim, runs, base, bound), _joules_table(runs)))


def _with_one_less(settings: dict[str, Any]) -> str:
    calibration = settings["calibration"]
    share = _share(calibration["attainment_with_one_less"])
    return f" (at the calibrated peak, one server less keeps {share} %)"


def _energy_table(
    claim: Claim, runs: dict[str, dict[str, Any]], base: dict[str, Any], bound: dict[str, Any] | None
) -> str:
    lines = [
        "| policy | kWh | vs single-pool % | paper % | vs packing % | in SLO % | TTFT P99 s | TBT P99 ms | mean GPUs |"
        " USD | kg CO2 | changes | wall s | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    packing = runs.get("packing")
    for policy, run in runs.items():
        if policy == "clairvoyant":
            continue
        against_packing = _change(run["energy_j"], packing["energy_j"]) if packing else ""
        lines.append(
            f"| {policy} | {run['energy_wh'] / 1000:.2f} | {_change(run['energy_j'], base['energy_j'])} |"
            f" {claim.paper.get(policy, '')} | {against_packing} | {_share(run['slo_attainment'])} |"
            f" {run['ttft_p99_s']['all']:.2f} | {1000 * run['tbt_p99_s']['all']:.0f} | {run['mean_gpus']:.1f} |"
            f" {run['cost_usd']:.0f} | {run['co2_g'] / 1000:.1f} | {run['reconfigurations']} | {run['wall_s']:.0f} |"
            f" {run['commit']} |"
        )
    if bound and math.isfinite(bound["energy_j"]):
        lines.append(
            f"| clairvoyant bound | {bound['energy_j'] / 3.6e6:.2f} | {_change(bound['energy_j'], base['energy_j'])} |"
            + " |" * 11
        )
        plan_j = bound.get("plan_energy_j", math.nan)
        if math.isfinite(plan_j):
            lines.append(
                f"| relaxed plans (no bound) | {plan_j / 3.6e6:.2f} | {_change(plan_j, base['energy_j'])} |" + " |" * 11
            )
        best = min((r["energy_j"] for p, r in runs.items() if p.startswith("dynamollm")), default=math.nan)
        gap = 100 * (best / bound["energy_j"] - 1)
        lines.append(f"\nGap of the better dynamollm to the clairvoyant bound: {gap:+.1f} %.")
    return "\n".join(lines)


def _joules_table(runs: dict[str, dict[str, Any]]) -> str:
    lines = [
        "Where the joules go, kWh:\n",
        f"| policy | {' | '.join(KINDS)} | busy GPU share % | mean MHz |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for policy, run in runs.items():
        if policy == "clairvoyant":
            continue
        kinds = " | ".join(f"{run['energy_by_kind_j'][kind] / 3.6e6:.2f}" for kind in KINDS)
        busy = 100 * run["busy_gpu_hours"] / max(run["gpu_hours"], 1e-9)
        clocks = run["series"]["clock_mhz"]
        lines.append(f"| {policy} | {kinds} | {busy:.0f} | {sum(clocks) / max(len(clocks), 1):.0f} |")
    return "\n".join(lines)


def _change(energy_j: float, base_j: float) -> str:
    return f"{100 * (energy_j / base_j - 1):+.1f}"


def _share(share: float) -> str:
    return f"{100 * share:.2f}"

"""The live demonstration: `dynamollm serve` with its controller, a trace replayed through it, watched from outside.

    python -m benchmarks.live_control --speedup 10 --duration 3600    (six minutes at ten times the trace's pace)
    python -m benchmarks.live_control --speedup 1 --duration 600 --config FILE --out FOLDER    (parity by the clock)
    python -m benchmarks.live_control --config benchmarks/live_control_vllm.yaml --trace surge --speedup 1 \
      --duration 540 --out benchmarks/results/live-control-vllm    (real vLLM servers with emulated devices)

Starts the gateway with the cluster of ``live_control.yaml`` (or ``--config``) and the replay as processes of their own,
and asks ``/admin/status`` every two seconds. Afterwards the same arrivals are simulated, sped up alike: under
``single-pool``, and as the configuration itself (`dynamollm simulate --config`), to compare energy and attainment with.
Writes a JSON and a plot: load, GPUs by TP and when they were changed, clocks and power over time. Energy is the
emulated GPUs' own counters, requests are the replay's account, what was saved so far is the gateway's own word.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.axes import Axes

from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile
from simulator.experiment import Scenario, prepare
from simulator.simulation import simulate
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.arrivals import Workload
from simulator.workload.transform import sped_up, window

OUT = Path(__file__).resolve().parent / "results" / "live-control"
PERIOD_S = 2.0
PATIENCE_S = 30.0  # of a question, on a machine that has no core to spare
START_S = 900.0  # a bound on a hang: real engines on a busy machine take minutes
PROFILE = "llama-3.1-70b-fp8-h100"
MARKS = {
    "ScaleOut": ("start", "^", "#31a354"),
    "ScaleIn": ("stop", "v", "#de2d26"),
    "Reshard": ("re-shard", "D", "#e6830c"),
}
"""What is marked in the plot: the action, its name there, shape and colour."""
CLUSTER = Path(__file__).resolve().parent / "live_control.yaml"


def main() -> None:
    """Run the demonstration and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="azure-conv")
    parser.add_argument("--speedup", type=float, default=10.0)
    parser.add_argument("--duration", type=float, default=3600.0, help="seconds of the trace")
    parser.add_argument("--config", type=Path, default=CLUSTER, help="the cluster")
    parser.add_argument("--port", type=int, default=18432)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    url = f"http://127.0.0.1:{given.port}"
    with served(given.port, given.config):
        began_s = time.monotonic()
        samples, report = watched(url, given.trace, given.speedup, given.duration)
        decisions = httpx.get(f"{url}/admin/decisions", params={"last": 500}, timeout=PATIENCE_S).json()
        changes = timeline(decisions, time.monotonic() - began_s)
        compared = httpx.get(f"{url}/admin/status", timeout=PATIENCE_S).json()["counterfactual"]
    workload = sped_up(window(open_workload(given.trace), 0.0, given.duration), given.speedup)
    nodes = sum(node["count"] for node in yaml.safe_load(given.config.read_text())["nodes"])
    baseline_j = single_pool_j(workload, nodes)
    result = {
        "command": " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "replay": report,
        "changes": counted(changes),
        "energy_j": energy_of(samples),
        "single_pool_simulated_j": baseline_j,
        "saved_so_far": compared,
        "simulated": parity(as_configured(given), report, samples),
        "samples": samples,
        "timeline": changes,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "run.json").write_text(json.dumps(result, indent=1))
    plot(samples, changes, baseline_j / (samples[-1]["at_s"] - samples[0]["at_s"]), given.out / "run.png")
    saved = 1.0 - energy_of(samples) / baseline_j
    print(
        json.dumps(
            {k: result[k] for k in ("changes", "energy_j", "single_pool_simulated_j", "saved_so_far", "simulated")},
            indent=1,
        )
    )
    print(
        f"energy against single-pool (simulated, {8 * nodes} GPUs always on): {-saved:+.1%}; plot {given.out}/run.png"
    )


@contextmanager
def served(port: int, config: Path) -> Iterator[None]:
    """The gateway as a person starts it; ended by SIGINT."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamollm", "serve", "--config", str(config), "--port", str(port)]
    )
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the gateway is not ready after {START_S:g} s, or has ended; see above")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == httpx.codes.OK:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def watched(url: str, trace: str, speedup: float, duration_s: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Replay, and what the gateway said of itself meanwhile."""
    replay = subprocess.Popen(
        f"{sys.executable} -m dynamollm replay --json --trace {trace} --url {url} "
        f"--speedup {speedup} --duration {duration_s}".split(),
        stdout=subprocess.PIPE,
        text=True,
    )
    samples = []
    began_s = time.monotonic()
    with replay, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        try:
            while replay.poll() is None:
                status = client.get("/admin/status").json()
                samples.append(sample_of(time.monotonic() - began_s, status))
                time.sleep(PERIOD_S)
        finally:
            replay.terminate()  # where it is not over, what is left of it means nothing
        output = replay.stdout.read() if replay.stdout else "{}"
    return samples, json.loads(output)


def sample_of(at_s: float, status: dict[str, Any]) -> dict[str, Any]:
    """One moment: GPUs by TP, mean clock, load and power of the instances."""
    running = [i for i in status["instances"] if i["state"] in ("ready", "draining", "starting")]
    gpus_by_tp = {str(tp): sum(i["tp"] for i in running if i["tp"] == tp) for tp in (2, 4, 8)}
    gpus = sum(gpus_by_tp.values())
    return {
        "at_s": round(at_s, 2),
        "gpus_by_tp": gpus_by_tp,
        "instances": len(running),
        "mean_sm_clock_mhz": sum(i["tp"] * i["sm_clock_mhz"] for i in running) / max(gpus, 1),
        "rate_rps": sum(i["rate_rps"] or 0.0 for i in running),
        "power_w": sum(i["power_w"] or 0.0 for i in running),
        "queued": status["queued"],
        "metered_j": status["metered_j"],
    }


def energy_of(samples: Sequence[dict[str, Any]]) -> float:
    """What the GPUs' counters rose by while the trace was replayed."""
    return float(samples[-1]["metered_j"] - samples[0]["metered_j"])


def timeline(decisions: dict[str, Any], now_s: float) -> list[dict[str, Any]]:
    """What was carried out, in order: when it was done, in seconds of the replay, what it was, and how it ended."""
    told = [
        {
            "at_s": round(now_s - operation["ago_s"], 2),
            "took_s": operation["took_s"],
            "kind": operation["action"]["kind"],
            "outcome": operation["outcome"],
            "reason": operation["reason"],
        }
        for operation in decisions["operations"]
    ]
    return sorted(told, key=lambda change: change["at_s"])


def counted(changes: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Changes by kind and outcome."""
    return dict(sorted(Counter(f"{change['kind']} {change['outcome']}" for change in changes).items()))


def as_configured(given: argparse.Namespace) -> dict[str, Any]:
    """The simulator's word on the same arrivals under the very same configuration."""
    output = subprocess.run(
        f"{sys.executable} -m dynamollm simulate --json --config {given.config} --trace {given.trace} "
        f"--speedup {given.speedup} --duration {given.duration}".split(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    run: dict[str, Any] = json.loads(output)["runs"][0]
    return run


def parity(simulated: dict[str, Any], report: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The simulation beside what was measured; energy as mean power, for the two end some seconds apart."""
    live_w = energy_of(samples) / (samples[-1]["at_s"] - samples[0]["at_s"])
    simulated_w = simulated["energy_j"] / simulated["horizon_s"]
    return {
        "energy_j": simulated["energy_j"],
        "slo_attainment": simulated["slo_attainment"],
        "changes": simulated["changes"],
        "live_w": live_w,
        "simulated_w": simulated_w,
        "energy_off_by": live_w / simulated_w - 1.0,
        "live_slo_attainment": report["total"]["within_slo"],
    }


def single_pool_j(workload: Workload, nodes: int) -> float:
    """What the paper's baseline uses for the same arrivals on so many nodes: all of them, TP8, highest clock."""
    scenario = Scenario(load_profile(PROFILE), load_capacity(PROFILE), nodes)
    setup, controller = prepare(scenario, "single-pool", workload)
    return simulate(setup, workload, controller, "single-pool", 0).energy_j


def plot(samples: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]], baseline_w: float, path: Path) -> None:
    """Load, GPUs by TP with the changes of them, mean clock, and power beside what single-pool takes in the mean."""
    at_s = np.array([s["at_s"] for s in samples])
    figure, axes = plt.subplots(
        4, 1, figsize=(10, 10), sharex=True, constrained_layout=True, height_ratios=(2, 3, 2, 2)
    )
    axes[0].plot(at_s, [s["rate_rps"] for s in samples], color="black")
    axes[0].set_ylabel("requests/s")
    by_tp = [[s["gpus_by_tp"][tp] for s in samples] for tp in ("2", "4", "8")]
    axes[1].stackplot(at_s, by_tp, labels=("TP2", "TP4", "TP8"), colors=("#c6dbef", "#6baed6", "#2171b5"), step="post")
    axes[1].set_ylabel("GPUs holding\nan instance")
    _mark(axes[1], changes, 1.08 * float(np.max(np.sum(by_tp, axis=0))))
    axes[2].plot(at_s, [s["mean_sm_clock_mhz"] for s in samples], color="#31a354")
    axes[2].set_ylabel("mean SM clock, MHz")
    axes[3].plot(at_s, [s["power_w"] / 1000 for s in samples], color="#de2d26", label="instances")
    axes[3].axhline(baseline_w / 1000, color="gray", linestyle="--", label="single-pool, mean (simulated)")
    axes[3].legend(loc="lower center", ncols=2, fontsize=9)
    axes[3].set_ylabel("power, kW")
    axes[3].set_xlabel("seconds since the replay began")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mark(ax: Axes, changes: Sequence[dict[str, Any]], height: float) -> None:
    """A row of marks above the GPUs: what was done to instances, and when. Clocks and moves are too many."""
    for kind, (name, marker, color) in MARKS.items():
        at_s = [c["at_s"] for c in changes if c["kind"] == kind and c["outcome"] == "done"]
        ax.scatter(
            at_s, [height] * len(at_s), marker=marker, color=color, s=45, zorder=3, label=f"{name} ({len(at_s)})"
        )
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=6, fontsize=9)


if __name__ == "__main__":
    main()

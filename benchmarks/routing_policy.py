"""What the router's two weights do: energy against latency on a fixed cluster, the rest of the product held still.

The routing functions run compiled in virtual time, on ten minutes of a workload; no controller changes anything, so
every difference is the router's. The table in docs/routing.md is this command's.

    python -m benchmarks.routing_policy [--trace azure-conv] [--rate-scale 12] [--nodes 12] [--tp 8] [--clock 1980]
"""

from dataclasses import dataclass

import click

from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass
from pools.scoring import Weights
from simulator.setup import PoolSetup, SimulationSetup
from simulator.simulation import simulate
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.transform import scaled, window
from solver.control import Effects, Level, Observation, ScaleOut, Tick

SPREADS = (0.0, 0.3, 1.0, 3.0, 30.0)
MARGINS = (0.6, 0.8, 0.9, 1.0)
NEVER_S = 1e12


@dataclass(frozen=True, slots=True)
class FixedCluster:
    """A controller that starts every instance at once and does nothing more."""

    nodes: int
    gpus_per_node: int
    tp: int
    sm_clock_mhz: int

    def first_tick(self, now_s: float) -> Tick:
        """At the start."""
        return Tick(now_s, Level.JOINT)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """All instances, then never again."""
        starts = tuple(
            ScaleOut(
                deadline_s=NEVER_S,
                instance_id=f"n{node}-{k}",
                pool="all",
                tp=self.tp,
                sm_clock_mhz=self.sm_clock_mhz,
                node=f"n{node}",
            )
            for node in range(self.nodes)
            for k in range(self.gpus_per_node // self.tp)
        )
        return Effects(starts, Tick(NEVER_S, Level.JOINT))


@click.command()
@click.option("--trace", default="azure-conv", show_default=True)
@click.option("--rate-scale", default=12.0, show_default=True)
@click.option("--duration", "duration_s", default=600.0, show_default=True, help="Seconds of the trace.")
@click.option("--profile", "profile_name", default="llama-3.1-70b-fp8-h100", show_default=True)
@click.option("--nodes", default=12, show_default=True)
@click.option("--tp", default=8, show_default=True)
@click.option("--clock", "sm_clock_mhz", default=1980, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    trace: str,
    rate_scale: float,
    duration_s: float,
    profile_name: str,
    nodes: int,
    tp: int,
    sm_clock_mhz: int,
    seed: int,
) -> None:
    """Energy and latency for each spread and margin of the router."""
    profile, default = load_profile(profile_name), Weights()
    points = [Weights(s, default.margin) for s in SPREADS] + [Weights(default.spread, m) for m in MARGINS]
    click.echo(f"{nodes} nodes, TP{tp}, {sm_clock_mhz} MHz; {trace} x {rate_scale:g}, {duration_s:g} s, seed {seed}")
    click.echo("| spread | margin | kWh | decode kWh | within SLO | TTFT P50 s | TTFT P99 s | mean TBT P99 s |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for weights in dict.fromkeys(points):
        workload = scaled(window(open_workload(trace, seed), 0.0, duration_s), rate_scale, seed)
        setup = SimulationSetup(profile, nodes, (PoolSetup("all", RequestClass.LL),), weights=weights)
        cluster = FixedCluster(nodes, setup.gpus_per_node, tp, sm_clock_mhz)
        run = simulate(setup, workload, cluster, "fixed", seed)
        ttft_s = [run.quantiles_s("ttft", q)["all"] for q in (0.5, 0.99)]
        click.echo(
            f"| {weights.spread:g} | {weights.margin:g} | {run.energy_j / 3.6e6:.3f} "
            f"| {run.energy_by_kind_j['decode'] / 3.6e6:.3f} | {run.slo_attainment:.2%} "
            f"| {ttft_s[0]:.3f} | {ttft_s[1]:.3f} | {run.quantiles_s('tpot', 0.99)['all']:.3f} |"
        )


if __name__ == "__main__":
    main()

"""What one controller books: requests per second of CPU, and GPUs, by the ledger that the leader keeps.

    python -m benchmarks.ledger_load [--json benchmarks/results/ledger_load.json]

A made load in made time: so many TP4 instances metered once a second, so many requests a second dealt out to them, each
with its beginning, first token and end, settled as in operation. CPU is this process' own.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from energy.accounting import GPU_HOUR_USD, Interval, MeteredInstance, Prices, Use, User
from energy.accounting_ledger import EnergyLedger
from energy.adapters.catalogue import load_profile
from energy.carbon import StaticIntensity
from energy.profile import GpuState

PROFILE = "llama-3.1-70b-fp8-h100"
TP, SECONDS, SERVED_S = 4, 20, 5
CLASSES = ("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL")
SCENARIOS = ((625, 0), (625, 1000), (625, 4000), (2500, 4000))  # instances, requests/s


@dataclass(frozen=True, slots=True)
class Booked:
    """CPU of one second of operation."""

    instances: int
    rate_rps: int
    cpu_ms_per_s: float


def book(instances: int, rate_rps: int, seconds: int = SECONDS) -> tuple[EnergyLedger, float]:
    """Run the ledger for so many seconds; it, and the CPU seconds it took."""
    profile = load_profile(PROFILE)
    clock_mhz = profile.sm_clocks_mhz[-1]
    idle_w = profile.idle_power_w(GpuState.LOADED, clock_mhz)
    held = [
        MeteredInstance(f"i-{n}", "LL", "llama", profile.gpu, TP, Use.IDLE, idle_w, profile.step(TP, clock_mhz))
        for n in range(instances)
    ]
    ledger = EnergyLedger(StaticIntensity(300.0, "made"), Prices(GPU_HOUR_USD, 0.0), 0.0)
    began_s = time.process_time()
    for second in range(seconds):
        for number in range(rate_rps):
            at_s, key = second + number / rate_rps, second * rate_rps + number
            user = User("llama", "LL", CLASSES[key % 9], f"tenant-{key % 50}")
            ledger.began(f"r-{key}", user, held[key % instances].id, 1000, at_s)
            ledger.first_token(f"r-{key}", at_s + 0.2)
            if (over := key - SERVED_S * rate_rps) >= 0:
                ledger.ended(f"r-{over}", at_s, 1000, 200)
        for instance in held:
            ledger.metered(Interval(instance, float(second), second + 1.0, 250.0 * TP))
        ledger.settle(second + 1.0)
    return ledger, time.process_time() - began_s


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results there.")
def main(json_path: Path | None) -> None:
    """Measure the ledger."""
    results = []
    for instances, rate_rps in SCENARIOS:
        _, cpu_s = book(instances, rate_rps)
        results.append(Booked(instances, rate_rps, round(1000 * cpu_s / SECONDS, 1)))
        click.echo(json.dumps(asdict(results[-1])))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")


if __name__ == "__main__":
    main()

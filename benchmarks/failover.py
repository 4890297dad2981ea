"""Kill the leading controller, then Redis, under load: what is lost, and how long until all is as before.

Two gateways, a controller and a standby, Redis (the installed redis-server or valkey-server), eight emulated instances,
each a process of its own on this machine; streams to both gateways all the time. docs/scaling.md has its table.

    python -m benchmarks.failover [--rounds 3] [--away 30] [--json benchmarks/results/failover.json]
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.adapters.shared_deployment import TERM_EPOCHS, Deployment, Load, deployed, wait_for

COMPLETE_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Failover:
    """What one round showed."""

    answered: int  # requests
    failed: int
    plan_s: float  # kill -9 of the leader to a plan of the standby
    away_s: float  # how long Redis was away
    answered_away: int  # requests answered meanwhile
    again_s: float  # Redis back to the cluster published again
    complete_s: float  # end of the load to a complete ledger
    booked: int  # requests in the ledger


def play(deployment: Deployment, away_s: float) -> Failover:
    """One round."""
    load = Load(deployment.urls)
    wait_for(lambda: deployment.plan()[1] >= 1, "a first plan")
    time.sleep(5.0)
    leader, (epoch, _) = deployment.leader(), deployment.published()
    deployment.controllers.pop(leader).kill()
    plan_s = wait_for(lambda: deployment.plan()[0] >= TERM_EPOCHS * (epoch + 1), "a plan of the standby")
    time.sleep(5.0)
    deployment.redis.kill()
    before = load.answered
    time.sleep(away_s)
    answered_away = load.answered - before
    deployment.redis.start()
    again_s = wait_for(lambda: deployment.published()[0] == epoch + 1, "the leader to go on in its epoch")
    time.sleep(5.0)
    answered = load.end()
    complete_s = wait_for(lambda: deployment.booked() >= answered, "a complete ledger", COMPLETE_WITHIN_S)
    return Failover(
        answered, len(load.failures), plan_s, away_s, answered_away, again_s, complete_s, deployment.booked()
    )


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--away", "away_s", default=30.0, show_default=True, help="Seconds without Redis.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the rounds here.")
def main(rounds: int, away_s: float, json_file: Path | None) -> None:
    """Kill the leader, kill Redis; print what was lost and how long things took."""
    results = []
    click.echo(
        "| round | answered | failed | new plan s | Redis away s | answered meanwhile | published again s | booked |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as deployment:
            r = play(deployment, away_s)
        results.append(r)
        click.echo(
            f"| {number + 1} | {r.answered} | {r.failed} | {r.plan_s:.1f} | {r.away_s:g} | {r.answered_away} "
            f"| {r.again_s:.1f} | {r.booked} |"
        )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()

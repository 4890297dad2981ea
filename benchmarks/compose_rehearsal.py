"""The compose file rehearsed without a container engine: its services as processes, load, and every panel of the board.

    python -m benchmarks.compose_rehearsal [--duration 75] [--keep]

Runs the very commands of docker-compose.yml (``benchmarks/compose_file.py`` says what is put in their place), with the
redis-server and prometheus of this machine; sends requests through the gateway; then asks Prometheus every query of
the Grafana board, as Grafana would. Fails if a service does not come up or go down, a target is not scraped, a rule
does not evaluate, a request is lost, or a panel would be empty. Grafana itself is not run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.adapters.service_processes import ServiceFailedError, ServiceProcesses, started
from benchmarks.board_queries import Answered, BoardQuery, answered, board_queries
from benchmarks.compose_file import Service, read_compose

ROOT = Path(__file__).resolve().parents[1]
BOARD = ROOT / "deploy" / "grafana" / "dashboards" / "dynamollm.json"
NOT_RUN = frozenset({"grafana"})  # no such program outside its image
STEP_S = 5


def rehearsed_services() -> dict[str, Service]:
    """Those of no profile, without what cannot be run here."""
    services = read_compose((ROOT / "docker-compose.yml").read_text())
    return {name: each for name, each in services.items() if not each.profiles and name not in NOT_RUN}


@click.command()
@click.option("--duration", "duration_s", default=75.0, show_default=True, help="Seconds of load.")
@click.option("--keep", is_flag=True, help="Keep the folder with the logs.")
def main(duration_s: float, keep: bool) -> None:
    """Rehearse docker-compose.yml."""
    folder = Path(tempfile.mkdtemp(prefix="compose-rehearsal-"))
    subnet = f"127.{os.getpid() >> 8 & 0x7F | 0x40}.{os.getpid() & 0xFF}"
    console = Console(width=140)
    try:
        problems = rehearse(rehearsed_services(), folder, subnet, duration_s, console)
    except ServiceFailedError as error:
        problems = [str(error)]
    for problem in problems:
        click.echo(f"compose-rehearsal: {problem}", err=True)
    if problems or keep:
        click.echo(f"logs: {folder}", err=True)
    else:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    sys.exit(1 if problems else 0)


def rehearse(services: dict[str, Service], folder: Path, subnet: str, duration_s: float, console: Console) -> list[str]:
    """Run it all; what was wrong."""
    with started(services, ROOT, folder, subnet) as processes:
        for running in processes.running.values():
            console.print(f"up: [bold]{running.service.name}[/bold]  {' '.join(running.argv)}", highlight=False)
        prometheus = f"http://{processes.stage.addresses['prometheus']}:9090"
        problems = _misplaced_instances(processes) + _load(processes, folder, duration_s)
        problems += _prometheus_problems(prometheus)
        answers = ask(prometheus, board_queries(json.loads(BOARD.read_text()), STEP_S))
        console.print(answers_table(answers))
        problems += [
            f"{a.query.panel} {a.query.ref}: nothing to show for {a.query.expr}" for a in answers if not a.shows
        ]
        for name in reversed(services):
            status = processes.stop(name)
            if status not in (0, -15, 143):
                problems.append(f"service {name} ended with status {status} on SIGTERM")
    console.print(f"{len(answers)} queries of {BOARD.name}, {sum(a.shows for a in answers)} with something to show")
    return problems


def _misplaced_instances(processes: ServiceProcesses) -> list[str]:
    """Instances must be reached at their service: at 127.0.0.1 each container would find only itself."""
    gateway = processes.stage.addresses["gateway"]
    status = httpx.get(f"http://{gateway}:8080/admin/status", timeout=10).json()
    hosts = {urlsplit(instance["url"]).hostname for instance in status["instances"]}
    wrong = hosts - set(processes.stage.addresses.values())
    found = [f"instances at {', '.join(map(str, wrong))} cannot be reached from another container"] if wrong else []
    return found if hosts else ["the gateway knows no instance"]


def _load(processes: ServiceProcesses, folder: Path, duration_s: float) -> list[str]:
    """Replay a trace through the gateway; requests that were lost."""
    url = f"http://{processes.stage.addresses['gateway']}:8080"
    command = ["replay", "--trace", "synthetic-conv", "--duration", str(duration_s), "--url", url, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dynamollm", *command],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=duration_s + 180,
        check=False,
    )
    if done.returncode:
        return [f"the replay ended with status {done.returncode}: {done.stderr.decode()[-1000:]}"]
    report = json.loads(done.stdout)
    (folder / "replay.json").write_text(json.dumps(report, indent=1))
    lost = report["planned"] - report["total"]["finished"]
    return [f"{lost} of {report['planned']} requests were not answered"] if lost else []


def _prometheus_problems(url: str) -> list[str]:
    """Targets that are not scraped, rules that do not evaluate."""
    targets = httpx.get(f"{url}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
    groups = httpx.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
    down = [t for t in targets if t["health"] != "up"]
    failing = [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    firing = [rule["name"] for group in groups for rule in group["rules"] if rule.get("state") == "firing"]
    return [
        *(f"target {t['scrapeUrl']} of {t['labels']['job']}: {t['lastError']}" for t in down),
        *(f"rule {rule['name']}: {rule.get('lastError', rule['health'])}" for rule in failing),
        *(f"alert {name} fires" for name in firing if name in ("TargetDown", "ControllerSilent")),
    ]


def ask(url: str, queries: Sequence[BoardQuery]) -> list[Answered]:
    """Every query, over the last minute where it is not instant."""
    now_s = time.time()
    answers = []
    with httpx.Client(base_url=url, timeout=30) as client:
        for query in queries:
            if query.instant:
                asked: dict[str, Any] = {"query": query.expr, "time": now_s}
                answer = client.get("/api/v1/query", params=asked)
            else:
                asked = {"query": query.expr, "start": now_s - 60, "end": now_s, "step": STEP_S}
                answer = client.get("/api/v1/query_range", params=asked)
            told = answer.json()
            if told["status"] != "success":
                raise click.ClickException(f"{query.panel} {query.ref}: {told['error']}: {query.expr}")
            answers.append(answered(query, told["data"]["result"]))
    return answers


def answers_table(answers: Sequence[Answered]) -> Table:
    """Panel by panel: how many series, and one value."""
    table = Table("panel", "query", "series", "last value", box=None, pad_edge=False)
    for a in answers:
        value = "[red]nothing[/red]" if a.value is None else f"{a.value:.4g}"
        expr = a.query.expr if len(a.query.expr) < 80 else a.query.expr[:77] + "..."
        table.add_row(a.query.panel, expr.replace("[", r"\["), str(a.series), value)
    return table


if __name__ == "__main__":
    main()

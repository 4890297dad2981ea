"""Prometheus' configuration and rules, and Grafana's board: valid, tested, and about metrics that exist."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.board_queries import board_queries
from benchmarks.compose_file import read_compose
from dynamollm.adapters.configuration import load
from dynamollm.cluster_metrics import PLAN_GAUGES
from dynamollm.shared_wiring import build_commander, build_gateway
from dynamollm.sharing_metrics import CommanderMetrics
from dynamollm.wiring import build
from energy.dcgm import dcgm_text
from energy.gpu import GpuReading
from proxy.gateway import Gateway

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
BOARD = json.loads((GRAFANA / "dashboards" / "dynamollm.json").read_text())
RULES = [
    rule
    for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*")
_NOT_NAMES = re.compile(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|without|group_left)\s*\([^)]*\)|\$\w+')
_FUNCTIONS = frozenset({"sum", "avg", "max", "min", "count", "rate", "increase", "changes", "abs", "absent"}) | {
    *("histogram_quantile", "topk", "vector", "or", "and")
}


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_scrape_configuration_is_valid():
    assert "SUCCESS" in promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@needs_promtool
def test_the_rules_do_what_their_tests_say():
    assert "SUCCESS" in promtool("test", "rules", str(PROMETHEUS / "rules_test.yml"))


def test_every_alert_is_tested_and_says_what_to_do():
    tests = (PROMETHEUS / "rules_test.yml").read_text()
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len(alerts) >= 10
    assert [rule["alert"] for rule in alerts if rule["alert"] not in tests] == []
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_targets_are_services_at_ports_they_listen_on():
    services = read_compose((ROOT / "docker-compose.yml").read_text())
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        found = [target for block in job.get("static_configs", ()) for target in block["targets"]]
        found += [f"{b['names'][0]}:{b['port']}" for b in job.get("dns_sd_configs", ())]
        assert found
        for target in found:
            name, port = target.split(":")
            assert port in " ".join(services[name].command), f"{target}: {name} is not told to listen there"


@pytest.fixture(scope="module")
def exposed():
    """Names of all samples that a scrape can hold, with histograms' and counters' endings."""
    settings = load(ROOT / "deploy" / "compose" / "cluster.yaml", {})
    services = build(load(None, {})).services  # one process has what the leading controller has
    gateway = build_gateway(settings, "gateway").services
    Gateway(gateway).tick(0.0)
    text = generate_latest(services.metrics.registry).decode() + generate_latest(gateway.metrics.registry).decode()
    registry = CollectorRegistry()
    registry.register(CommanderMetrics(build_commander(settings, "controller")))
    text += generate_latest(registry).decode()
    text += dcgm_text([GpuReading("n", 0, "u", "H100", 1980, 100.0, 1.0, 30.0, None, "i")]).decode()
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)", text, re.MULTILINE):
        names |= {name, f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    names |= {rule["record"] for rule in RULES if "record" in rule}
    return names | {"up"}


def metrics_of(expr: str) -> set[str]:
    """The metric names in an expression."""
    return {
        name
        for name in _NAME.findall(_NOT_NAMES.sub(" ", expr))
        if name not in _FUNCTIONS and not name.startswith("__")
    }


def test_names_are_found_in_an_expression():
    expr = 'topk(9, sum by (job) (rate(a_bucket{x=~"$m", y="b_total"}[5m]))) * 1e6 / on (z) c:d:e or vector(0)'
    assert metrics_of(expr) == {"a_bucket", "c:d:e"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_read_metrics_that_exist(rule, exposed):
    plan = {name for name in metrics_of(rule["expr"]) if name.startswith("dynamollm_plan_")}  # of the first plan on
    assert metrics_of(rule["expr"]) - plan <= exposed


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_read_metrics_that_exist_and_say_what_they_show(panel, exposed):
    assert panel["description"]
    assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "prometheus"
        names = metrics_of(target["expr"])
        assert names
        assert {name for name in names if not name.startswith("dynamollm_plan_")} <= exposed


def test_plan_gauges_on_the_board_are_the_collector_s():
    known = {name for name, _ in PLAN_GAUGES.values()} | {"dynamollm_plan_epoch", "dynamollm_plan_version"}
    used = {name for panel in PANELS for t in panel["targets"] for name in metrics_of(t["expr"])}
    used |= {name for rule in RULES for name in metrics_of(rule["expr"])}
    assert {name for name in used if name.startswith("dynamollm_plan_")} <= known


def test_panels_neither_overlap_nor_leave_the_board():
    def cells(panel):
        at = panel["gridPos"]
        return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}

    for one, other in combinations(BOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert max(x for panel in BOARD["panels"] for x, _ in cells(panel)) == 23
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_board_answers_what_an_operator_asks():
    asked = " ".join(query.expr for query in board_queries(BOARD, 5))
    for metric in (
        "slo_attainment",
        "time_to_first_token",
        "time_per_output_token",
        "time_between_chunks",
        "energy_joules",
        "co2_grams",
        "cost_usd",
        "dynamollm_instances",
        "tp, sm_clock_mhz",
        "dynamollm_decisions",
        "dynamollm_operations",
        "event_loop_lag",
        "waiting_requests",
    ):
        assert metric in asked


def test_the_board_is_provisioned_with_its_data_source():
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert [source["uid"] for source in sources["datasources"]] == ["prometheus"]
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "dynamollm.yml").read_text())
    mounts = {str(m.target) for m in read_compose((ROOT / "docker-compose.yml").read_text())["grafana"].mounts}
    assert provider["providers"][0]["options"]["path"] in mounts

"""Simulated runs as files, tables and the results page: what is stored is what is shown."""

import numpy as np
import pytest
from rich.console import Console

from benchmarks.results_page import write_page
from benchmarks.simulation_plots import plot_runs
from benchmarks.simulation_report import print_runs, read_json, store_run, write_json
from pools.classes import RequestClass
from simulator.histograms import bucket_of
from simulator.results import RunResult, Series
from simulator.world import COEFFICIENTS, make_world

SETTINGS = {
    "trace": "azure-conv",
    "rate_scale": 5.5,
    "calibration": {"attainment_with_one_less": 0.95},
}


def run_of(policy, energy_kwh, finished=1000, within=995):
    ledger = make_world(np.zeros(0, dtype=COEFFICIENTS)).ledger
    ledger.arrived[RequestClass.LL] = ledger.finished[RequestClass.LL] = finished
    ledger.within_slo[RequestClass.LL] = within
    ledger.output_tokens[RequestClass.LL] = 100 * finished
    ledger.ttft[RequestClass.LL, bucket_of(0.5)] = finished
    ledger.tbt[RequestClass.LL, bucket_of(0.05)] = finished
    joules = energy_kwh * 3.6e6
    at_s = np.array([60.0, 120.0])
    return RunResult(
        policy=policy,
        workload="azure-conv x5.5",
        profile="llama-2-70b-h100",
        gpus=96,
        seed=1,
        horizon_s=120.0,
        ledger=ledger,
        energy_by_kind_j={
            "prefill": 0.4 * joules,
            "decode": 0.5 * joules,
            "idle": 0.1 * joules,
            "boot": 0.0,
            "transition": 0.0,
            "parked": 0.0,
            "free": 0.0,
        },
        gpu_s=96 * 120.0,
        busy_gpu_s=48 * 120.0,
        changes=dict.fromkeys(("scale_out", "scale_in", "reshard", "reassign", "clock", "park", "wake", "refused"), 1),
        series=Series(
            at_s=at_s,
            power_w=np.array([1000.0, 2000.0]),
            rate_rps=np.array([10.0, 20.0]),
            gpus_on=np.array([96, 96]),
            gpus_by_tp={2: np.array([0, 8]), 4: np.array([16, 8]), 8: np.array([80, 80])},
            clock_mhz=np.array([1980.0, 1400.0]),
        ),
        co2_g=100.0,
        cost_usd=7.2,
        wall_s=1.5,
    )


def test_a_stored_run_holds_its_numbers_seed_commit_settings_and_series(tmp_path):
    path = store_run(run_of("dynamollm", 10.0), tmp_path, SETTINGS)
    assert path.name == "azure-conv_x5.5--llama-2-70b-h100--dynamollm--seed1.json"
    stored = read_json(path)
    assert stored["energy_wh"] == pytest.approx(10_000.0)
    assert stored["seed"] == 1
    assert stored["settings"]["rate_scale"] == 5.5
    assert "commit" in stored
    assert stored["slo_attainment"] == 0.995
    assert stored["ttft_p99_s"]["LL"] == pytest.approx(0.5, rel=0.011)
    assert stored["series"]["gpus_by_tp"]["4"] == [16, 8]
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written


def test_the_table_compares_with_the_first(capsys):
    console = Console(width=140)
    print_runs([run_of("single-pool", 20.0), run_of("dynamollm", 10.0)], console)
    printed = capsys.readouterr().out
    assert "-50.0" in printed
    assert "99.50" in printed


def test_the_page_sets_ours_beside_the_paper_s(tmp_path):
    folder = tmp_path / "results" / "conv-1h"
    for policy, kwh in (("single-pool", 20.0), ("packing", 16.0), ("dynamollm-paper", 13.0), ("dynamollm", 10.0)):
        store_run(run_of(policy, kwh), folder, SETTINGS)
    write_json(
        folder / "x--llama-2-70b-h100--clairvoyant.json",
        {"policy": "clairvoyant", "energy_j": 9.0 * 3.6e6, "plan_energy_j": 9.5 * 3.6e6},
    )
    page = tmp_path / "results.md"
    write_page(tmp_path / "results", page, ("conv-1h", "code-day"), ("llama-2-70b-h100",))
    text = page.read_text()
    assert "1 h Conversation" in text
    assert "## 24 h" not in text  # nothing has been run
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    ours = text[text.index("| dynamollm |") :].splitlines()[0].split("|")
    assert ours[2].strip() == "10.00"
    assert ours[3].strip() == "-50.0"
    assert ours[5].strip() == "-37.5"  # against packing
    assert "-35" in next(line for line in text.splitlines() if line.startswith("| dynamollm-paper |"))
    assert "+11.1 %" in text  # gap to the bound
    assert "clairvoyant bound" in rows
    assert "9.50" in rows["relaxed plans (no bound)"]


def test_a_plot_is_drawn(tmp_path):
    path = plot_runs([run_of("single-pool", 20.0), run_of("dynamollm", 10.0)], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000

import subprocess

import httpx
import pytest
from matplotlib.axes import Axes

from benchmarks import live_control
from benchmarks.live_control import CLUSTER, MARKS, counted, energy_of, plot, sample_of, timeline, watched
from dynamollm.adapters.configuration import load
from dynamollm.controller_recipe import controller_recipe


def operation(kind, ago_s, outcome="done", reason=""):
    return {"ago_s": ago_s, "took_s": 1.5, "action": {"kind": kind}, "outcome": outcome, "reason": reason}


DECISIONS = {
    "ticks": [],
    "operations": [
        operation("Reshard", 40.0),
        operation("ScaleOut", 70.0),
        operation("ScaleOut", 10.0, "abandoned", "no room"),
        operation("SetFrequency", 99.5),
        operation("ScaleIn", 0.0),
    ],
}


def instance(state, tp, clock, rate=1.0, power=500.0):
    return {"state": state, "tp": tp, "sm_clock_mhz": clock, "rate_rps": rate, "power_w": power}


def status(metered_j, *instances):
    return {"instances": instances, "queued": 3, "metered_j": metered_j}


def test_changes_are_told_by_the_replays_clock_and_counted_by_outcome():
    told = timeline(DECISIONS, 100.0)
    assert [(c["at_s"], c["kind"]) for c in told] == [
        (0.5, "SetFrequency"),
        (30.0, "ScaleOut"),
        (60.0, "Reshard"),
        (90.0, "ScaleOut"),
        (100.0, "ScaleIn"),
    ]
    assert told[3]["reason"] == "no room"
    assert counted(told) == {
        "Reshard done": 1,
        "ScaleIn done": 1,
        "ScaleOut abandoned": 1,
        "ScaleOut done": 1,
        "SetFrequency done": 1,
    }


def test_a_moment_counts_the_gpus_that_hold_an_instance():
    seen = sample_of(
        2.004,
        status(
            10.0,
            instance("ready", 2, 1200),
            instance("starting", 4, 1980, None, None),
            instance("draining", 8, 1200),
            instance("stopped", 8, 300),
        ),
    )
    assert seen["gpus_by_tp"] == {"2": 2, "4": 4, "8": 8}
    assert seen["instances"] == 3
    assert seen["mean_sm_clock_mhz"] == pytest.approx((2 * 1200 + 4 * 1980 + 8 * 1200) / 14)
    assert (seen["rate_rps"], seen["power_w"], seen["queued"]) == (2.0, 1000.0, 3)


def test_energy_is_what_the_counters_rose_by():
    samples = [sample_of(at_s, status(100.0 + 7.0 * at_s)) for at_s in (0.0, 2.0, 4.0)]
    assert energy_of(samples) == pytest.approx(28.0)


def test_every_start_stop_and_reshard_that_was_done_is_marked(tmp_path, monkeypatch):
    marked = {}
    scatter = Axes.scatter

    def noted(self, x, y, **options):
        marked[options["label"]] = list(x)
        return scatter(self, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", noted)
    samples = [sample_of(at_s, status(at_s, instance("ready", 4, 1200))) for at_s in (0.0, 50.0, 100.0)]
    path = tmp_path / "run.png"
    plot(samples, timeline(DECISIONS, 100.0), 4000.0, path)
    assert marked == {"start (1)": [30.0], "stop (1)": [100.0], "re-shard (1)": [60.0]}
    assert {"ScaleOut", "ScaleIn", "Reshard"} == set(MARKS)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_gateway_that_does_not_answer_ends_the_replay_too(monkeypatch):
    begun = []
    popen = subprocess.Popen

    def sleeping(command, **options):
        begun.append(popen(["sleep", "600"], **options))
        return begun[-1]

    monkeypatch.setattr(live_control.subprocess, "Popen", sleeping)
    with pytest.raises(httpx.HTTPError):
        watched("http://127.0.0.1:9", "azure-conv", 10.0, 60.0)
    assert begun[0].poll() is not None


def test_the_demonstration_plans_as_often_in_the_traces_time_as_in_life():
    settings = load(CLUSTER, {})
    controller = controller_recipe(settings)(1)
    assert settings.controller.pace == 10.0
    assert controller.policy.periods.joint_s == 12.0
    assert controller._settings.history_s == 30.0
    assert controller._settings.changes.dwell_s == 180.0
    assert controller._settings.changes.start_s == settings.driver.startup_s, "a start is as long as it is"
    assert controller.policy.periods.instance_s == 5.0
    assert settings.slo == load(None, {}).slo

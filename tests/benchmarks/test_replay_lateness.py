import json

import pytest

from benchmarks.replay_lateness import SLEEPER, main, measure, schedule


def test_the_replay_and_the_bare_sleep_are_measured_side_by_side():
    found = measure(20.0, 1.0)
    assert found["finished"] == found["requests"] == len(schedule(20.0, 1.0)) > 5
    for late in (found["replay_late_s"], found["bare_sleep_late_s"]):
        assert 0 <= late["p50"] <= late["p99"] <= late["max"]


def test_the_sleeper_prints_its_lateness(capsys):
    main(["50", "0.2", SLEEPER])
    assert json.loads(capsys.readouterr().out)["p50"] >= 0


def test_the_schedule_is_the_same_for_both():
    assert schedule(50.0, 4.0).arrival_s.tolist() == schedule(50.0, 4.0).arrival_s.tolist()
    assert len(schedule(50.0, 40.0)) == pytest.approx(2000, rel=0.1)

import json

import pytest

from benchmarks.abort_latency import free_port, main, served, summary


def test_a_summary_counts_what_came_within_the_bound():
    assert summary([0.001, 0.003, 0.2]) == {"tries": 3, "median_ms": 3.0, "worst_ms": 200.0, "within_100_ms": 2}


def test_every_way_of_leaving_is_measured_on_a_gateway_of_its_own(capsys):
    main(["2"])
    found = json.loads(capsys.readouterr().out)
    ways = [name for name in found if "streaming" in name]
    assert len(ways) == 4
    for way in ways:
        assert found[way]["tries"] == 2
        assert 0 < found[way]["median_ms"] <= found[way]["worst_ms"] < 10_000


def test_a_gateway_that_does_not_come_up_is_said_to(monkeypatch):
    monkeypatch.setenv("DYNAMOLLM_POOLS", "[]")
    with pytest.raises(RuntimeError, match="not ready"), served(free_port()):
        pass

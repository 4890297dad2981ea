import json

import pytest
from click.testing import CliRunner

from benchmarks.solver_scaling import CASES, Case, Timing, as_text, main, time_case
from energy.adapters.capacity_file import load_capacity


def timing(**changes):
    values = {
        "case": "x",
        "gpus": 320,
        "models": 1,
        "integers": 7,
        "columns": 100,
        "rows": 60,
        "solves": 2,
        "wall_p50_s": 0.05,
        "wall_p99_s": 0.2,
        "cpu_p50_s": 0.04,
        "cpu_p99_s": 0.08,
        "gap_max": 0.001,
        "optimal": 2,
        "target_s": 0.1,
    }
    return Timing(**{**values, **changes})


def test_a_case_is_solved_to_the_gap_and_counted():
    result = time_case(Case(96), load_capacity("llama-2-70b-h100"), 2)
    assert result.optimal == result.solves == 2
    assert result.gap_max <= 1.1e-3
    assert 0.0 < result.wall_p50_s <= result.wall_p99_s


def test_a_target_is_met_on_the_clock_on_the_wall_and_with_every_proof():
    assert not timing().met
    assert timing(wall_p99_s=0.09).met
    assert not timing(wall_p99_s=0.09, optimal=1).met
    assert "MISSED" in as_text([timing()], {})


def test_the_targets_of_the_document_are_among_the_cases():
    assert {(c.gpus, c.models): c.target_s for c in CASES if c.target_s} == {
        (320, 1): 0.1,
        (10_000, 1): 1.0,
        (10_000, 64): 3.0,
    }


@pytest.mark.slow
def test_the_command_prints_json():
    result = CliRunner().invoke(main, ["--solves", "1", "--only", CASES[0].name, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.output[result.output.index("{") :])
    assert [t["gpus"] for t in document["solves"]] == [CASES[0].gpus] == [96]
    assert set(document["clock_choice_s"]) == {"8", "64", "512"}

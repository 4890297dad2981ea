"""`dynamollm simulate`: documented JSON, stored runs, clear refusals."""

import json

import pytest
from click.testing import CliRunner

from dynamollm.commands.simulate import command
from dynamollm.errors import UserError

ARGS = ["--trace", "synthetic-conv", "--duration", "300", "--gpus", "32", "--profile", "llama-2-70b-h100"]
DOCUMENTED = {
    "policy",
    "requests",
    "energy_j",
    "gpu_hours",
    "cost_usd",
    "co2_g",
    "slo_attainment",
    "ttft_p99_s",
    "tbt_p99_s",
    "reconfigurations",
    "wall_s",
}


def simulate(tmp_path, *more):
    result = CliRunner().invoke(command, [*ARGS, "--out", str(tmp_path), *more], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_json_holds_what_is_documented_for_each_policy(tmp_path):
    runs = json.loads(simulate(tmp_path, "--policy", "single-pool,dynamollm", "--json"))["runs"]
    assert [run["policy"] for run in runs] == ["single-pool", "dynamollm"]
    for run in runs:
        assert set(run) >= DOCUMENTED
        assert run["requests"] == run["finished"] > 500
        assert run["co2_g"] > 0 < run["cost_usd"]
    single, ours = runs
    assert single["requests"] == ours["requests"]
    assert ours["energy_j"] < single["energy_j"]
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_one_seed_one_result(tmp_path):
    first, second = (
        json.loads(simulate(tmp_path, "--policy", "dynamollm", "--seed", "3", "--json"))["runs"][0] for _ in range(2)
    )
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}


def test_a_table_for_people(tmp_path):
    output = simulate(tmp_path, "--policy", "single-pool", "--plot")
    assert "where the joules go" in output
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy", "nonsense"], "no policy 'nonsense'"),
        (["--gpus", "30"], "multiple"),
        (["--gpus", "40000"], "40000 GPUs may hold 20000 instances"),
        (["--profile", "no-such"], "shipped profiles"),
        (["--trace", "/no/such/file.csv"], "no/such"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(command, [*ARGS, "--out", str(tmp_path), *more], catch_exceptions=False)


def test_a_configuration_is_simulated_as_serve_would_run_it(tmp_path):
    (run,) = json.loads(simulate(tmp_path, "--config", "built-in", "--speedup", "2", "--json"))["runs"]
    assert run["requests"] == run["finished"] > 500
    assert 150.0 <= run["horizon_s"] < 200.0, "300 s at twice the pace, and the last answers"
    assert run["gpus"] == 32
    assert run["changes"]["clock"] > 0

"""The configuration: read, overridden, refused with the place and the fix."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dynamollm.adapters.configuration import apply_environment, load, parse_yaml
from dynamollm.cli import group
from dynamollm.settings import Settings
from dynamollm.validation import ConfigurationError, convert_unit, path_of

SMALL = {
    "models": [{"name": "m", "profile": "llama-3.1-70b-fp8-h100"}],
    "nodes": [{"name": "n", "gpus": 8}],
    "pools": [{"name": "all", "model": "m", "request_class": "LL", "tp": 8}],
}


def write(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def problems(tmp_path: Path, tree: object, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(write(tmp_path, tree), environ or {})
    return caught.value.problems


def test_the_built_in_cluster_is_valid_and_has_the_nine_pools():
    settings = load(None, {})
    assert [pool.name for pool in settings.pools] == ["SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"]
    assert sum(node.gpus * node.count for node in settings.nodes) >= sum(p.tp * p.instances for p in settings.pools)


def test_an_engine_chosen_on_the_command_line_stands_over_file_and_environment(tmp_path):
    settings = load(write(tmp_path, SMALL), {"DYNAMOLLM_DRIVER__KIND": "emulator"}, engine="vllm")
    assert settings.driver.kind == "vllm"


def test_the_built_in_cluster_of_emulated_devices_is_valid_and_small():
    settings = load(None, {}, engine="vllm-emulated")
    assert settings.driver.kind == "vllm-emulated"
    assert sum(pool.instances for pool in settings.pools) == 3  # each is a real server of more than a gigabyte


def test_what_show_prints_is_a_configuration_that_gives_the_same_settings(tmp_path):
    shown = CliRunner().invoke(group, ["config", "show"], env={"DYNAMOLLM_SERVER__PORT": "9001"})
    assert shown.exit_code == 0, shown.output
    path = tmp_path / "shown.yaml"
    path.write_text(shown.output)
    assert load(path, {}) == load(None, {"DYNAMOLLM_SERVER__PORT": "9001"})


def test_show_never_prints_a_key(tmp_path):
    path = write(tmp_path, {**SMALL, "auth": {"api_keys": ["sk-very-secret"]}})
    shown = CliRunner().invoke(group, ["config", "show", "--config", str(path)])
    assert "sk-very-secret" not in shown.output
    assert "1 key(s), not shown" in shown.output


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sever": {}}, "sever: unknown key; did you mean server?"),
        ({"server": {"prot": 1}}, "server.prot: unknown key; did you mean port?"),
        ({"server": {"colour": 1}}, "server.colour: unknown key; known here: host, port, shutdown_grace_s"),
        ({"server": {"port": "9000"}}, 'server.port: input should be a valid integer; found "9000"'),
        ({"server": {"port": 70000}}, "server.port: input should be less than or equal to 65535; found 70000"),
        ({"slo": {"tbt_ms": 100}}, "slo.tbt_ms: unknown key; did you mean tbt_s: 0.1?"),
        ({"slo": {"tbt_s": 100}}, "the key's unit is seconds: did you mean 0.1?"),
        ({"slo": {"tbt_s": "100ms"}}, "the key's unit is s: write 0.1"),
        ({"slo": {"tbt_s": "100 W"}}, "the key's unit is s: write a plain number"),
        ({"slo": {"ttft_s": [2.0, 0.4, 0.25]}}, "slo.ttft_s: a longer input cannot have the tighter TTFT"),
        ({"slo": {"cuts": {"input_tokens": [1024, 256]}}}, "slo.cuts.input_tokens: the two cuts must rise"),
        ({"slo": {"cuts": {"inputs": 1}}}, "slo.cuts.inputs: unknown key; did you mean input_tokens?"),
        ({"models": []}, "models: at least one is needed"),
        (
            {"pools": [{"name": "p", "model": "m", "request_class": "LL", "tp": 3}]},
            "pools[0].tp: input should be 1, 2, 4",
        ),
        ({"pools": [{"name": "p", "model": "x", "request_class": "LL", "tp": 8}]}, "pools[0].model: 'x' is not among"),
        (
            {"pools": [{"name": "p", "model": "m", "request_class": "LX", "tp": 8}]},
            "pools[0].request_class: input should be",
        ),
        ({"pools": [{"name": "p", "model": "m", "request_class": "SS", "tp": 8}]}, "is kept for LL"),
        ({"pools": [{"name": "p", "model": "m", "tp": 8}]}, "pools[0].request_class: is required and not given"),
        (
            {"pools": [{"name": "p", "model": "m", "request_class": "LL", "tp": 8, "instances": 2}]},
            "pools: the instances need 16 GPUs (TP 8..8, each inside one node), nodes have 8",
        ),
        ({"nodes": [{"name": "n"}, {"name": "n"}]}, "nodes[1].name: 'n' is already nodes[0]"),
        ({"driver": {"kind": "attach"}}, "driver.urls: the attach driver needs at least one URL"),
        ({"driver": {"kind": "attach", "urls": {"x": ["http://h"]}}}, "driver.urls.x: no such pool"),
        ({"driver": {"kind": "attach", "urls": {"all": ["h:1"]}}}, "driver.urls.all[0]: must begin with http://"),
        (
            {"driver": {"kind": "attach", "urls": {"all": ["http://h"]}}},
            "controller.policy: attached servers are not this gateway's to start or stop; use scale-freq, or static",
        ),
        (
            {"driver": {"kind": "attach", "urls": {"all": ["http://h"]}}, "controller": {"policy": "scale-freq"}},
            "controller.policy: scale-freq turns clocks, and driver.urls does not say whose GPUs are whose",
        ),
        (
            {"driver": {"kind": "vllm"}, "controller": {"policy": "scale-freq"}},
            "controller.policy: nobody sets clocks; name the node's agent in driver.vllm.agents",
        ),
        (
            {"driver": {"kind": "attach", "urls": {"all": ["http://h"]}, "urls_file": "s.yaml"}},
            "driver.urls: driver.urls_file is given too; keep one",
        ),
        (
            {"driver": {"kind": "attach", "urls": {"all": ["http://h"]}, "vllm": {"agents": {"n": "unix:/a"}}}},
            "driver.vllm.agents: driver.urls does not say whose GPUs are whose; use driver.urls_file",
        ),
        (
            {"driver": {"kind": "attach", "urls_file": "s.yaml", "vllm": {"agents": {"x": "unix:/a"}}}},
            "driver.vllm.agents.x: no such node",
        ),
        ({"driver": {"urls_file": "s.yaml"}}, "driver.urls_file: only the attach driver takes URLs"),
        ({"store": {"kind": "redis", "url": "h:6379"}}, "store.url: must begin with redis://"),
        ({"energy": {"carbon_zone": "DE"}}, "energy.carbon_token: a zone needs the token"),
        ({"energy": {"carbon_region": "x", "carbon_g_per_kwh": 1}}, "energy.carbon_g_per_kwh: carbon_region is given"),
        ({"energy": {"electricity_usd_per_mwh": 1}}, "energy.electricity_usd_per_mwh: unknown key; did you mean"),
        ({"driver": {"urls": {"all": ["http://h"]}}}, "driver.urls: only the attach driver takes URLs"),
        ({"driver": {"kind": "vllm", "urls": {"all": ["http://h"]}}}, "driver.urls: only the attach driver takes URLs"),
        (
            {"driver": {"kind": "vllm"}, "nodes": [{"name": "n", "count": 2}]},
            "nodes: the vllm driver starts processes on",
        ),
        ({"driver": {"kind": "vllm", "vllm": {"agents": {"x": "unix:/a"}}}}, "driver.vllm.agents.x: no such node"),
        (
            {"driver": {"kind": "vllm", "vllm": {"agents": {"n": "h:1"}}}},
            "driver.vllm.agents.n: must begin with unix: or http://; found 'h:1'",
        ),
        (
            {"driver": {"kind": "vllm-emulated", "vllm": {"agents": {"n": "unix:/a"}}}},
            "driver.vllm.agents: an emulated device has no agent",
        ),
        (
            {"driver": {"kind": "vllm", "vllm": {"comand": "x"}}},
            "driver.vllm.comand: unknown key; did you mean command?",
        ),
        (
            {
                "driver": {"kind": "vllm"},
                "pools": [{"name": "p", "model": "m", "request_class": "LL", "tp": 8, "sm_clock_mhz": 1200}],
            },
            "pools[0].sm_clock_mhz: nobody sets clocks",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(tmp_path, change, expected):
    assert any(expected in problem for problem in problems(tmp_path, {**SMALL, **change}))


def test_every_problem_is_named_at_once(tmp_path):
    found = problems(tmp_path, {**SMALL, "server": {"port": -1, "hots": "x"}, "slo": {"tbt_s": 0}})
    assert len(found) == 3


def test_instances_do_not_span_nodes(tmp_path):
    pools = [{"name": "a", "model": "m", "request_class": "LL", "tp": 8}]
    nodes = [{"name": "n", "gpus": 4, "count": 4}]
    assert "each inside one node" in problems(tmp_path, {**SMALL, "pools": pools, "nodes": nodes})[0]


def test_a_missing_file_and_broken_yaml_say_so(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file"):
        load(tmp_path / "none.yaml", {})
    broken = tmp_path / "broken.yaml"
    broken.write_text("server:\n  port: [1\n")
    with pytest.raises(ConfigurationError, match="line 3, column 1"):
        load(broken, {})
    broken.write_text("server: {port: 1}\nserver: {port: 2}\n")
    with pytest.raises(ConfigurationError, match="'server' is given twice"):
        load(broken, {})
    broken.write_text("- 1\n")
    with pytest.raises(ConfigurationError, match="must hold a mapping"):
        load(broken, {})


def test_the_environment_overrides_keys_and_list_entries(tmp_path):
    environ = {"DYNAMOLLM_SERVER__PORT": "9000", "DYNAMOLLM_POOLS__0__SM_CLOCK_MHZ": "1200", "OTHER": "x"}
    settings = load(write(tmp_path, SMALL), environ)
    assert settings.server.port == 9000
    assert settings.pools[0].sm_clock_mhz == 1200


def test_a_wrong_variable_is_refused_by_its_key(tmp_path):
    assert problems(tmp_path, SMALL, {"DYNAMOLLM_SEVRER__PORT": "1"})[0] == "sevrer: unknown key; did you mean server?"
    with pytest.raises(ConfigurationError, match="not an index below 1"):
        load(write(tmp_path, SMALL), {"DYNAMOLLM_POOLS__7__TP": "4"})


def test_the_data_folder_variable_is_no_key(tmp_path):
    load(write(tmp_path, SMALL), {"DYNAMOLLM_DATA": "/somewhere"})


def test_the_schema_describes_every_section():
    printed = CliRunner().invoke(group, ["config", "schema"])
    assert set(json.loads(printed.output)["properties"]) == set(Settings.__dataclass_fields__)


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(), max_size=3), st.text("abc", min_size=1))
def test_overriding_leaves_the_original_as_it_was(plain, key):
    before = dict(plain)
    assert apply_environment(plain, {f"DYNAMOLLM_{key}": "7"}) == {**before, key: 7}
    assert plain == before


@given(st.integers(1, 10_000))
def test_units_of_one_quantity_convert(value):
    assert convert_unit("queue_ttl_ms", value, ["queue_ttl_s"]) == ("queue_ttl_s", pytest.approx(value / 1000))
    assert convert_unit("queue_ttl_mhz", value, ["queue_ttl_s"]) is None


def test_numbers_with_exponents_are_numbers_and_paths_read_well():
    assert parse_yaml("1e3", "text") == 1000.0
    assert path_of(("pools", 2, "tp")) == "pools[2].tp"

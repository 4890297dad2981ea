"""capacity_table: shipped where it fits, built once and kept where it does not."""

from dataclasses import replace

import pytest

from benchmarks.profile_table import shipped_traffic
from energy.adapters.catalogue import load_fitted
from simulator.adapters.capacity_cache import cache_folder, capacity_table


@pytest.fixture(scope="module")
def traffic():
    return shipped_traffic()


def test_a_shipped_profile_needs_no_building(tmp_path, traffic):
    told = []
    table = capacity_table(load_fitted("llama-2-70b-h100"), traffic, told.append, tmp_path)
    assert table.profile == "llama-2-70b-h100"
    assert (told, list(tmp_path.iterdir())) == ([], [])


def test_a_changed_profile_is_built_once_and_kept(tmp_path, traffic):
    profile = load_fitted("llama-3.1-70b-fp8-h100")
    small = replace(
        profile,
        times={8: profile.times[8]},
        sm_clocks_mhz=(1980,),
        physics=replace(profile.physics, loaded_w=130.0),
    )
    told = []
    first = capacity_table(small, traffic[:1], told.append, tmp_path)
    assert len(told) == 1
    assert first.power[0, 0, 0, 0] == pytest.approx(8 * 130.0)
    again = capacity_table(small, traffic[:1], told.append, tmp_path)
    assert len(told) == 1
    assert again.fingerprint == first.fingerprint
    assert again.max_rate == pytest.approx(first.max_rate)


def test_the_cache_lies_where_the_environment_says(tmp_path):
    assert cache_folder({"DYNAMOLLM_CACHE": str(tmp_path)}) == tmp_path / "capacity"
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "dynamollm" / "capacity"

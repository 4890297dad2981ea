"""MeasuredProfile: exact where it was measured, interpolated inside the hull, the fit outside, and it says which."""

import csv

import pytest
from test_fit import TRUE_GPU, TRUE_TIMES, sweep

from energy.adapters.catalogue import load_profile
from energy.closed_loop import LoadShape, closed_loop
from energy.fitted import at_clock
from energy.measured import MeasuredProfile
from energy.profile import GpuState, ProfileError, step_time_s

COLUMNS = (
    "gpu,model,tp,sm_clock_mhz,input_tokens,output_tokens,concurrency,ttft_s,tbt_s,power_w,precision,engine,source"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "x1.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS.split(","))
        for m in sweep():
            load = (m.load.input_tokens, m.load.output_tokens, m.load.clients)
            means = (m.ttft_s, m.tpot_s, m.power_w)
            writer.writerow((m.gpu, m.model, m.tp, m.sm_clock_mhz, *load, *means, m.precision, m.engine, "a test"))
    return path


@pytest.fixture(scope="module")
def profile(path):
    profile = load_profile(path)
    assert isinstance(profile, MeasuredProfile)
    return profile


def test_a_measured_point_is_given_back_as_it_was_measured(profile):
    for m in profile.rows[::7]:
        reading = profile.read(m.tp, m.sm_clock_mhz, m.load.input_tokens, m.load.output_tokens, m.load.clients)
        assert reading.inside_hull
        assert (reading.ttft_s, reading.tpot_s, reading.power_w) == pytest.approx((m.ttft_s, m.tpot_s, m.power_w))


def test_between_measured_points_it_lies_between_them(profile):
    low, high = (profile.read(2, 1200, 512.0, 256.0, clients) for clients in (4, 16))
    between = profile.read(2, 1200, 512.0, 256.0, 8)
    assert between.inside_hull
    assert low.tpot_s < between.tpot_s < high.tpot_s
    assert low.power_w < between.power_w < high.power_w


def test_outside_the_hull_the_fit_answers_and_says_so(profile):
    load = LoadShape(4096.0, 256.0, 16)
    reading = profile.read(2, 1600, *load[:3])
    assert not reading.inside_hull
    assert reading.tpot_s == pytest.approx(closed_loop(profile.fit.step(2, 1600), load).tpot_s)
    true = closed_loop(at_clock(TRUE_TIMES[2], TRUE_GPU, 1600), load)
    assert reading.tpot_s == pytest.approx(true.tpot_s, rel=0.15)


def test_it_is_an_energy_profile_of_what_was_measured(profile):
    assert (profile.name, profile.gpu, profile.model) == ("x1", "X1", "someone/unknown-7b")
    assert (profile.tensor_parallel, profile.sm_clocks_mhz) == ((1, 2), (800, 1200, 1600))
    true_s = step_time_s(at_clock(TRUE_TIMES[1], TRUE_GPU, 1600), 0.0, 0.0, 8.0, 8000.0)
    assert step_time_s(profile.step(1, 1600), 0.0, 0.0, 8.0, 8000.0) == pytest.approx(true_s, rel=0.1)
    assert profile.kv_capacity_tokens(1) >= 16 * (2048 + 128)  # as many as were seen to run
    loaded, bare = (profile.idle_power_w(state, 1600) for state in (GpuState.LOADED, GpuState.BARE))
    assert 0 < bare < loaded < min(m.power_w for m in profile.rows)


def test_a_bad_csv_is_refused_by_line(path, tmp_path):
    spoilt = tmp_path / "spoilt.csv"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace("X1", "")
    spoilt.write_text("\n".join(lines))
    with pytest.raises(ProfileError, match=r"spoilt\.csv line 5: gpu is empty"):
        load_profile(spoilt)

"""fit_profile: finds a known truth again through noise, says how far off it is, and refuses what cannot carry a fit."""

from dataclasses import replace

import numpy as np
import pytest

from energy.closed_loop import LoadShape, closed_loop
from energy.fit import FitRequest, fit_profile
from energy.fitted import StepTimes, at_clock
from energy.gpus import gpu_physics
from energy.measurements import FitRefusedError, Measurement, clients_of_rate
from energy.plausibility import findings

# a GPU and a model that the project has no figures of
TRUE_GPU = replace(
    gpu_physics("H100-SXM"),
    name="X1",
    max_clock_mhz=1600,
    min_clock_mhz=600,
    board_w=350.0,
    loaded_w=60.0,
    bare_w=35.0,
    active_w=15.0,
    compute_w=260.0,
    memory_w=110.0,
    knee_mhz=1000.0,
)
TRUE_TIMES = {
    tp: StepTimes(
        overhead_s=2.5e-3,
        host_s_per_seq=4e-5,
        compute_s_per_token=9e-5 / tp,
        attention_s_per_token2=3e-9 / tp,
        weights_s=26e-3 / tp,
        kv_s_per_token=8e-8 / tp,
        communication_s=0.0 if tp == 1 else 1.2e-3,
        communication_s_per_token=0.0 if tp == 1 else 5e-6,
        sharpness=1.7,
    )
    for tp in (1, 2)
}


def sweep(noise: float = 0.03, clocks=(800, 1200, 1600), tps=(1, 2), seed: int = 1) -> list[Measurement]:
    """A sweep as a user would make one, on the true GPU."""
    rng = np.random.default_rng(seed)
    rows = []
    for tp in tps:
        for clock in clocks:
            c = at_clock(TRUE_TIMES[tp], TRUE_GPU, clock)
            for shape in ((128.0, 128.0), (512.0, 256.0), (2048.0, 128.0)):
                for clients in (1, 4, 16):
                    load = LoadShape(*shape, clients, rounds=4)
                    loop = closed_loop(c, load)
                    power_w = c.idle_w + c.active_w * loop.kernels_share
                    power_w += c.compute_w * loop.compute_share + c.memory_w * loop.memory_share
                    a, b, p = np.exp(noise * rng.standard_normal(3))
                    rows.append(
                        Measurement(
                            where=f"sweep line {len(rows) + 2}",
                            gpu="X1",
                            model="someone/unknown-7b",
                            precision="bf16",
                            engine="vllm",
                            tp=tp,
                            sm_clock_mhz=clock,
                            load=load,
                            ttft_s=loop.ttft_s * a,
                            tpot_s=loop.tpot_s * b,
                            power_w=min(power_w, c.max_w) * p,
                        )
                    )
    return rows


@pytest.fixture(scope="module")
def report():
    return fit_profile(FitRequest("x1", sweep(), board_w=350.0))


def test_an_unseen_gpu_and_model_are_fitted_with_errors_of_the_noise(report):
    errors = report.profile.provenance.errors
    assert errors["ttft_by_shape"] < 0.15
    assert errors["tpot_by_shape"] < 0.07
    assert errors["ttft_by_concurrency"] < 0.15
    assert errors["tpot_by_concurrency"] < 0.07
    assert errors["power"] < 0.10
    assert findings(report.profile) == []


def test_a_load_that_was_never_measured_is_predicted(report):
    for tp in (1, 2):
        load = LoadShape(1024.0, 200.0, 8, rounds=4)
        true = closed_loop(at_clock(TRUE_TIMES[tp], TRUE_GPU, 1000), load)
        predicted = closed_loop(report.profile.step(tp, 1000), load)
        assert predicted.ttft_s == pytest.approx(true.ttft_s, rel=0.15)
        assert predicted.tpot_s == pytest.approx(true.tpot_s, rel=0.07)


def test_the_profile_says_what_was_measured_and_what_assumed(report):
    provenance = report.profile.provenance
    assert provenance.origin["sm_clock"] == "fitted over 3 clocks"
    assert provenance.origin["voltage"] == "fitted over the measured clocks"
    assert provenance.origin["idle_power"].startswith("physical assumption")
    assert provenance.validity.concurrency == (1, 16)
    one_clock = fit_profile(FitRequest("x1", sweep(clocks=(1600,)), cross_validate=False))
    assert one_clock.profile.provenance.origin["sm_clock"].startswith("physical assumption")
    assert one_clock.profile.provenance.origin["voltage"].startswith("physical assumption")


def test_outliers_do_not_pull_the_fit(report):
    rows = sweep()
    rows[5] = replace(rows[5], tpot_s=10 * rows[5].tpot_s)
    rows[30] = replace(rows[30], ttft_s=0.1 * rows[30].ttft_s)
    spoilt = fit_profile(FitRequest("x1", rows, cross_validate=False))
    median = np.nanmedian(np.abs(np.delete(spoilt.times.tpot_errors, 5)))
    assert median < 0.05


REFUSALS = {
    "too few points": lambda rows: rows[:3],
    "no power column": lambda rows: [replace(m, power_w=None) for m in rows],
    "mixed precision": lambda rows: [replace(rows[0], precision="fp8"), *rows[1:]],
    "mixed engine": lambda rows: [replace(rows[0], engine="other"), *rows[1:]],
    "no sm_clock_mhz": lambda rows: [replace(m, sm_clock_mhz=None) for m in rows],
    "a mean time between tokens": lambda rows: [replace(m, tpot_s=None) for m in rows],
    "no measurement left": lambda rows: [],
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_carry_a_fit_is_refused_with_the_reason(reason):
    with pytest.raises(FitRefusedError, match=reason.replace("no power column", "power column")):
        fit_profile(FitRequest("x1", REFUSALS[reason](sweep()), cross_validate=False))


def test_rows_that_speak_of_something_else_than_the_engine_are_left_out_and_named():
    rows = sweep(clocks=(1600,))
    held_up = next(i for i, m in enumerate(rows) if m.tp == 2)
    rows[held_up] = replace(rows[held_up], ttft_s=5.0)
    lone = replace(rows[0], tp=4, where="the only TP4 row")
    fitted = fit_profile(FitRequest("x1", [*rows, lone], cross_validate=False))
    assert len(fitted.left_out) == 2
    assert any("waited outside the engine" in reason for reason in fitted.left_out)
    assert any("the only TP4 row" in reason for reason in fitted.left_out)
    assert fitted.profile.tensor_parallel == (1, 2)


def test_an_open_loop_keeps_as_many_in_flight_as_littles_law_says():
    assert clients_of_rate(rate_rps=2.0, ttft_s=0.5, tbt_s=0.02, output_tokens=101.0) == 5
    assert clients_of_rate(rate_rps=0.001, ttft_s=0.1, tbt_s=0.01, output_tokens=2.0) == 1

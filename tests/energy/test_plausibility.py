"""findings: every shipped profile passes, and each way of being unphysical is found and named."""

from dataclasses import replace

import pytest

from energy.adapters.catalogue import load_fitted, load_profile, profile_names
from energy.plausibility import findings

GOOD = load_fitted("llama-3.1-70b-fp8-h100")


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_physical(name):
    assert findings(load_profile(name)) == []


def with_times(**changed):
    """The good profile with fields of its smallest TP changed."""
    tp = GOOD.tensor_parallel[0]
    return replace(GOOD, times={**GOOD.times, tp: replace(GOOD.times[tp], **changed)})


def with_physics(**changed):
    return replace(GOOD, physics=replace(GOOD.physics, **changed))


class Bent:
    """The good profile with the steps of some configurations replaced."""

    def __init__(self, bend):
        self.bend = bend

    def __getattr__(self, name):
        return getattr(GOOD, name)

    def step(self, tp, sm_clock_mhz):
        return self.bend(tp, sm_clock_mhz, GOOD.step(tp, sm_clock_mhz))


class TestCoefficients:
    @pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["overhead_s", "kv_s_per_token", "communication_s"])
    def test_each_must_be_finite_and_not_negative(self, name, value):
        found = findings(with_times(**{name: value}))
        assert found
        assert all(name in sentence and "TP2" in sentence for sentence in found)

    def test_the_smooth_maximum_needs_an_exponent_of_one_or_more(self):
        assert any(
            "sharpness is 0.5, it must be 1 or more" in sentence for sentence in findings(with_times(sharpness=0.5))
        )

    @pytest.mark.parametrize("name", ["weights_s", "compute_s_per_token"])
    def test_weights_and_arithmetic_are_never_free(self, name):
        assert any("must be above 0" in sentence for sentence in findings(with_times(**{name: 0.0})))

    def test_an_engine_without_cache_serves_nobody(self):
        found = findings(replace(GOOD, kv_capacity={**GOOD.kv_capacity, 4: -12}))
        assert found == ["TP4: no KV cache beside the weights (-12 tokens)"]

    def test_impossible_coefficients_are_told_alone(self):
        """Nothing else could be computed with them."""
        spoilt = replace(with_times(overhead_s=float("nan")), kv_capacity=dict.fromkeys(GOOD.tensor_parallel, 0))
        assert all("overhead_s" in s or "KV cache" in s for s in findings(spoilt))


class TestAxes:
    def test_a_higher_clock_must_not_be_slower(self):
        def bend(tp, clock, c):
            return c._replace(weights_s=3 * c.weights_s) if (tp, clock) == (4, 1980) else c

        assert "TP4: a step takes longer at 1980 than at 1800 MHz" in findings(Bent(bend))

    def test_a_higher_clock_must_not_draw_less(self):
        def bend(tp, clock, c):
            return c._replace(compute_w=0.1 * c.compute_w) if (tp, clock) == (8, 1400) else c

        assert "TP8: a step draws less at 1400 than at 1200 MHz" in findings(Bent(bend))

    def test_more_gpus_must_not_read_a_prompt_more_slowly(self):
        def bend(tp, clock, c):
            return c._replace(compute_s_per_token=8 * c.compute_s_per_token) if tp == 8 else c

        assert any(
            s.startswith("a prefill of 2048 tokens takes longer on TP8 (") and "than on TP4 (" in s
            for s in findings(Bent(bend))
        )


class TestBoard:
    def test_idle_states_must_rise_from_off_to_loaded(self):
        found = findings(with_physics(bare_w=GOOD.physics.loaded_w + 50.0))
        assert any(
            "idle power must rise from off over bare and parked to loaded" in s and "bare 172 W" in s for s in found
        )

    def test_the_limit_is_the_boards(self):
        assert any(
            "power limit of 800 W is above the 700 W of H100-SXM" in s for s in findings(with_physics(board_w=800.0))
        )

    def test_idle_is_below_the_limit(self):
        assert any("is not below the limit of 100 W" in s for s in findings(with_physics(board_w=100.0)))

    def test_a_board_nobody_knows_is_checked_without_its_datasheet(self):
        assert findings(with_physics(name="X1", board_w=800.0)) == []

"""moved_to: memory-bound work gets quicker with the bandwidth, the rest stays, and the profile says it was moved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.adapters.catalogue import load_fitted
from energy.gpus import gpu_physics
from energy.models import model_architecture
from energy.plausibility import findings
from energy.profile import step_power_w, step_time_s
from energy.recipes import MOVES, RECIPES
from energy.transfer import moved_times, moved_to

SOURCE = load_fitted("llama-3.1-8b-bf16-h100")
H200 = gpu_physics("H200-SXM")
MOVED = moved_to(SOURCE, H200, "moved", {"tpot_median": 0.1})
RATIO = H200.bandwidth_bytes_per_s / SOURCE.physics.bandwidth_bytes_per_s


@given(st.floats(0.25, 4.0))
def test_only_memory_traffic_follows_the_bandwidth(ratio):
    moved = moved_times(SOURCE.times, ratio)
    assert moved.keys() == SOURCE.times.keys()
    for tp, times in SOURCE.times.items():
        for name in times.__slots__:
            before, after = getattr(times, name), getattr(moved[tp], name)
            scaled = before / ratio if name in ("weights_s", "kv_s_per_token") else before
            assert after == pytest.approx(scaled)


@given(st.floats(0.25, 4.0))
def test_moving_there_and_back_changes_nothing(ratio):
    back = moved_times(moved_times(SOURCE.times, ratio), 1.0 / ratio)
    for tp, times in SOURCE.times.items():
        assert [getattr(back[tp], n) for n in times.__slots__] == pytest.approx(
            [getattr(times, n) for n in times.__slots__]
        )


@pytest.mark.parametrize("tp", SOURCE.tensor_parallel)
def test_decoding_gains_and_long_prefills_do_not(tp):
    clock = SOURCE.sm_clocks_mhz[-1]
    before, after = SOURCE.step(tp, clock), MOVED.step(tp, clock)
    decode = (0.0, 0.0, 32.0, 32 * 2000.0)
    assert step_time_s(after, *decode) < step_time_s(before, *decode)
    prefill = (8192.0, 8192.0**2 / 2, 0.0, 0.0)
    assert step_time_s(after, *prefill) == pytest.approx(step_time_s(before, *prefill), rel=0.02)
    assert step_power_w(after, *prefill) <= H200.board_w


def test_the_cache_is_that_of_the_other_board():
    model = model_architecture(SOURCE.model)
    for tp in SOURCE.tensor_parallel:
        assert MOVED.kv_capacity_tokens(tp) == model.kv_capacity_tokens(tp, H200.memory_bytes, "bf16")
        assert MOVED.kv_capacity_tokens(tp) > SOURCE.kv_capacity_tokens(tp)


def test_it_says_what_it_is_and_where_its_errors_come_from():
    provenance = MOVED.provenance
    assert provenance.origin["load"].startswith("physical assumption: the fit of llama-3.1-8b-bf16-h100")
    assert "the same die" in provenance.origin["activity_power"]
    assert provenance.errors == {"tpot_median": 0.1}
    assert provenance.sources == SOURCE.provenance.sources
    assert (MOVED.name, MOVED.gpu) == ("moved", "H200-SXM")
    assert findings(MOVED) == []


def test_activity_powers_are_those_of_the_fit_not_of_the_datasheet():
    old = SOURCE.physics
    assert (MOVED.physics.active_w, MOVED.physics.compute_w, MOVED.physics.memory_w) == (
        old.active_w,
        old.compute_w,
        old.memory_w,
    )
    assert MOVED.physics.bare_w == H200.bare_w


class TestShippedMoves:
    @pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
    def test_a_move_is_checked_where_the_same_move_was_measured(self, move):
        fitted = {recipe.name: recipe for recipe in RECIPES}
        assert fitted[move.source].gpu != move.gpu
        checked_from = fitted[move.checked_from]
        assert checked_from.gpu == fitted[move.source].gpu
        assert move.checked_on.gpu == move.gpu
        assert checked_from.model == move.checked_on.model

    @pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
    def test_the_shipped_file_is_the_source_moved(self, move):
        shipped, source = load_fitted(move.name), load_fitted(move.source)
        again = moved_to(source, gpu_physics(move.gpu), move.name, shipped.provenance.errors)
        for tp in source.tensor_parallel:
            for name in source.times[tp].__slots__:
                assert getattr(shipped.times[tp], name) == pytest.approx(getattr(again.times[tp], name), rel=1e-4)
        assert shipped.kv_capacity == again.kv_capacity
        assert shipped.provenance.errors

"""The Gpu port's own arithmetic: clocks snapped to what a board has, readings that a board may lack."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.gpu import ClockEvent, ClockLock, ClockRangeError, GpuLostError, GpuUnsupportedError, read, snap, snap_lock

supported = st.lists(st.integers(200, 2000), min_size=1, max_size=40, unique=True).map(sorted)


class TestSnapping:
    @given(st.integers(1, 3000), supported)
    def test_to_the_nearest_the_lower_of_two_as_near(self, clock, clocks):
        found = snap(clock, clocks)
        assert found in clocks
        assert found == min(clocks, key=lambda each: (abs(each - clock), each))

    @given(supported, st.data())
    def test_a_supported_clock_is_left_alone(self, clocks, data):
        clock = data.draw(st.sampled_from(clocks))
        assert snap(clock, clocks) == clock

    @given(st.integers(1, 3000))
    def test_where_none_are_known_the_far_end_will_see(self, clock):
        assert snap(clock, ()) == clock

    @given(st.integers(1, 3000), st.integers(0, 1000), supported)
    def test_a_range_stays_a_range(self, low, width, clocks):
        lock = snap_lock(ClockLock(low, low + width), clocks)
        assert clocks[0] <= lock.low_mhz <= lock.high_mhz <= clocks[-1]

    @pytest.mark.parametrize(("low", "high"), [(0, 900), (-5, 900), (1000, 900)])
    def test_what_is_no_range_is_refused(self, low, high):
        with pytest.raises(ClockRangeError, match=rf"{low}\.\.{high} MHz is not a range of SM clocks"):
            snap_lock(ClockLock(low, high), (600, 900, 1200))


class TestClockEvents:
    def test_bits_of_a_newer_driver_are_left_out(self):
        assert ClockEvent.of_mask(0x4 | 0x8000) is ClockEvent.SW_POWER_CAP

    @given(st.integers(0, 2**64 - 1))
    def test_any_mask_is_read(self, mask):
        events = ClockEvent.of_mask(mask)
        assert events.value == mask & 0x1FF

    def test_several_at_a_time(self):
        events = ClockEvent.of_mask(0x4 | 0x20)
        assert ClockEvent.SW_POWER_CAP in events
        assert ClockEvent.SW_THERMAL in events
        assert ClockEvent.IDLE not in events


class Board:
    """A GPU on which the named readings fail."""

    index, uuid, name = 3, "GPU-3", "H100"

    def __init__(self, fails=(), error=GpuUnsupportedError):
        self.fails, self.error = fails, error

    def __getattr__(self, name):
        def reading():
            if name in self.fails:
                raise self.error(f"GPU 3: no {name}")
            return {"clock_events": ClockEvent.IDLE}.get(name, 42)

        return reading


READINGS = ("sm_clock_mhz", "power_w", "energy_j", "temperature_c", "clock_events")


class TestReading:
    @pytest.mark.parametrize("missing", READINGS)
    def test_what_a_board_cannot_tell_is_none_and_the_rest_is_there(self, missing):
        found = read(Board(fails=(missing,)), "node-1")
        assert (found.node, found.index, found.uuid, found.name) == ("node-1", 3, "GPU-3", "H100")
        assert [name for name in READINGS if getattr(found, name) is None] == [missing]

    def test_a_lost_board_is_not_a_board_without_readings(self):
        with pytest.raises(GpuLostError):
            read(Board(fails=("power_w",), error=GpuLostError), "node-1")

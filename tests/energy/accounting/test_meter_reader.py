"""MeterReader: counters of GPUs to intervals of instances."""

from dataclasses import replace

import pytest

from energy.accounting import MeteredInstance, Use
from energy.accounting_meter import MeterReader
from energy.gpu import GpuReading

PAIR = MeteredInstance("i-1", "MM", "llama", "H100-SXM", 2, Use.IDLE, 120.0)
ONE = MeteredInstance("i-2", "SS", "llama", "H100-SXM", 1, Use.TRANSITION, 120.0)
HELD = {("n", 0): PAIR, ("n", 1): PAIR, ("n", 2): ONE}


def reading(index, energy_j, power_w=None):
    return GpuReading("n", index, f"GPU-{index}", "H100", 1980, power_w, energy_j, 40.0)


def test_the_gpus_of_an_instance_are_one_interval():
    meter = MeterReader()
    assert meter.read([reading(i, 100.0 * i) for i in range(4)], HELD, 0.0) == []
    intervals = meter.read([reading(i, 100.0 * i + 10.0 + i) for i in range(4)], HELD, 2.0)
    assert [(i.instance, i.begin_s, i.end_s, i.energy_j) for i in intervals] == [
        (PAIR, 0.0, 2.0, 21.0),
        (ONE, 0.0, 2.0, 12.0),
    ]


def test_a_counter_that_ran_backwards_was_reset():
    meter = MeterReader()
    meter.read([reading(2, 5000.0)], HELD, 0.0)
    (interval,) = meter.read([reading(2, 30.0)], HELD, 1.0)
    assert interval.energy_j == 30.0


def test_a_gpu_without_a_counter_is_integrated_from_its_power():
    meter = MeterReader()
    meter.read([reading(2, None, 100.0)], HELD, 0.0)
    (interval,) = meter.read([reading(2, None, 300.0)], HELD, 4.0)
    assert interval.energy_j == pytest.approx(800.0)
    assert meter.read([reading(2, None, None)], HELD, 5.0) == []


def test_a_reading_that_was_missed_is_made_up_for_by_the_next():
    meter = MeterReader()
    meter.read([reading(0, 0.0), reading(1, 0.0)], HELD, 0.0)
    (first,) = meter.read([reading(0, 10.0)], HELD, 1.0)
    assert (first.instance, first.energy_j) == (replace(PAIR, gpus=1), 10.0)
    intervals = meter.read([reading(0, 20.0), reading(1, 25.0)], HELD, 2.0)
    assert sorted((i.begin_s, i.end_s, i.energy_j) for i in intervals) == [(0.0, 2.0, 25.0), (1.0, 2.0, 10.0)]


def test_another_reader_goes_on_from_the_counters_of_one_and_no_joule_is_lost():
    one, other = MeterReader(), MeterReader()
    one.read([reading(0, 100.0), reading(1, 50.0), reading(2, None, 80.0)], HELD, 1.0)
    counters = one.counters()
    assert sorted(counters.values()) == [(1.0, 50.0), (1.0, 100.0)]
    other.resume(counters)
    (interval,) = other.read([reading(0, 130.0), reading(1, 90.0), reading(2, None, 80.0)], HELD, 5.0)
    assert (interval.begin_s, interval.end_s, interval.energy_j) == (1.0, 5.0, 70.0)

"""Readings under DCGM's names, and back."""

from hypothesis import given
from hypothesis import strategies as st

from energy.dcgm import dcgm_text, read_dcgm
from energy.gpu import ClockEvent, GpuReading

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
READINGS = st.builds(
    GpuReading,
    node=TEXT,
    index=st.integers(0, 15),
    uuid=TEXT,
    name=TEXT,
    sm_clock_mhz=st.integers(0, 3000),
    power_w=st.none() | st.integers(0, 10**6).map(lambda mw: mw / 1000),
    energy_j=st.none() | st.integers(0, 10**15).map(lambda mj: mj / 1000),
    temperature_c=st.none() | st.integers(0, 120),
    clock_events=st.none() | st.integers(0, 0x1FF).map(ClockEvent.of_mask),
    instance_id=TEXT,
)


@given(st.lists(READINGS, max_size=5, unique_by=lambda r: (r.node, r.index)))
def test_what_is_written_reads_back(readings):
    assert read_dcgm(dcgm_text(readings).decode()) == sorted(readings, key=lambda r: (r.node, r.index))


def test_an_exporters_own_text_is_read_and_other_metrics_are_passed_over():
    text = (
        "# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).\n"
        'DCGM_FI_DEV_POWER_USAGE{gpu="3",UUID="GPU-1",pci_bus_id="1b",modelName="NVIDIA H100",Hostname="n1"} 98.1\n'
        'DCGM_FI_PROF_SM_ACTIVE{gpu="3",Hostname="n1"} 0.5\n'
        "process_cpu_seconds_total 12\n"
    )
    (reading,) = read_dcgm(text)
    assert (reading.node, reading.index, reading.power_w, reading.energy_j) == ("n1", 3, 98.1, None)

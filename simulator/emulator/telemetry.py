"""What an emulated GPU reads, as the node agent of a real one would say it. Pure: GPUs in, bytes out."""

from collections.abc import Iterable

from energy.dcgm import dcgm_text as render
from energy.gpu import GpuReading
from simulator.emulator.gpus import EmulatedGpu

AMBIENT_C = 30.0
C_PER_W = 0.065  # an SXM board at its 700 W limit is about 75 C


def reading(gpu: EmulatedGpu, now_s: float) -> GpuReading:
    """SM clock, power, energy and temperature at this moment."""
    power_w = gpu.power_w(now_s)
    return GpuReading(
        node=gpu.node,
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.physics.name,
        sm_clock_mhz=gpu.sm_clock_mhz,
        power_w=power_w,
        energy_j=gpu.energy_mj(now_s) / 1000.0,
        temperature_c=round(AMBIENT_C + C_PER_W * power_w),
        instance_id=gpu.holder.id if gpu.holder is not None else "",
    )


def dcgm_text(gpus: Iterable[EmulatedGpu], now_s: float) -> bytes:
    """The readings of every powered GPU under DCGM's names."""
    return render(reading(gpu, now_s) for gpu in gpus if gpu.powered)

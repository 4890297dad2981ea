"""The emulated GPUs' readings as Prometheus text under DCGM's names. Pure: readings in, bytes out."""

from collections.abc import Iterable

from simulator.emulator.gpus import EmulatedGpu

AMBIENT_C = 30.0
C_PER_W = 0.065  # an SXM board at its 700 W limit is about 75 C


def dcgm_text(gpus: Iterable[EmulatedGpu], now_s: float) -> bytes:
    """SM clock (MHz), power (W), energy (mJ) and temperature (C) of every powered GPU."""
    rows = [(_labels(gpu), gpu) for gpu in gpus if gpu.powered]
    power_w = {gpu.uuid: gpu.power_w(now_s) for _, gpu in rows}
    families: tuple[tuple[str, str, str, list[float]], ...] = (
        ("SM_CLOCK", "gauge", "SM clock frequency (in MHz).", [gpu.sm_clock_mhz for _, gpu in rows]),
        ("POWER_USAGE", "gauge", "Power draw (in W).", [round(power_w[gpu.uuid], 3) for _, gpu in rows]),
        (
            "TOTAL_ENERGY_CONSUMPTION",
            "counter",
            "Energy since the start (in mJ).",
            [gpu.energy_mj(now_s) for _, gpu in rows],
        ),
        ("GPU_TEMP", "gauge", "Temperature (in C).", [round(AMBIENT_C + C_PER_W * power_w[g.uuid]) for _, g in rows]),
    )
    lines = []
    for name, kind, text, values in families:
        lines += [f"# HELP DCGM_FI_DEV_{name} {text}", f"# TYPE DCGM_FI_DEV_{name} {kind}"]
        lines += [f"DCGM_FI_DEV_{name}{{{labels}}} {value}" for (labels, _), value in zip(rows, values, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def _labels(gpu: EmulatedGpu) -> str:
    holder = gpu.holder.id if gpu.holder is not None else ""
    return (
        f'gpu="{gpu.index}",UUID="{gpu.uuid}",device="nvidia{gpu.index}",modelName="{gpu.physics.name}",'
        f'hostname="{gpu.node}",Hostname="{gpu.node}",instance_id="{holder}"'
    )

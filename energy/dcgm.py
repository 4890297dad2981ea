"""GPU readings as Prometheus text under the names of NVIDIA's DCGM exporter, both ways. Pure: values to bytes and back.

The node agent and the emulator write it, so that boards and tools made for DCGM read them; accounting reads it.
"""

import re
from collections.abc import Iterable, Mapping

from energy.gpu import ClockEvent, GpuReading

_PREFIX = "DCGM_FI_DEV_"
_FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("SM_CLOCK", "gauge", "SM clock frequency (in MHz)."),
    ("POWER_USAGE", "gauge", "Power draw (in W)."),
    ("TOTAL_ENERGY_CONSUMPTION", "counter", "Energy since the start (in mJ)."),
    ("GPU_TEMP", "gauge", "Temperature (in C)."),
    ("CLOCKS_EVENT_REASONS", "gauge", "Why the clock is below what was asked (bit mask)."),
)
_SAMPLE = re.compile(r"^DCGM_FI_DEV_(\w+)\{(.*)\}\s+(\S+)")
_ESCAPE = re.compile(r"\\(.)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def dcgm_text(readings: Iterable[GpuReading]) -> bytes:
    """The readings as text; a reading that is None has no sample."""
    rows = [(_labels(reading), _values(reading)) for reading in readings]
    lines = []
    for name, kind, text in _FAMILIES:
        samples = [f"{_PREFIX}{name}{{{labels}}} {values[name]}" for labels, values in rows if name in values]
        if samples:
            lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}", *samples]
    return ("\n".join(lines) + "\n").encode()


def _values(reading: GpuReading) -> dict[str, float]:
    energy_mj = None if reading.energy_j is None else round(reading.energy_j * 1000.0)
    events = None if reading.clock_events is None else reading.clock_events.value
    values = (reading.sm_clock_mhz, _milli(reading.power_w), energy_mj, reading.temperature_c, events)
    return {name: value for (name, _, _), value in zip(_FAMILIES, values, strict=True) if value is not None}


def _milli(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _labels(r: GpuReading) -> str:
    node = _escape(r.node)
    return (
        f'gpu="{r.index}",UUID="{_escape(r.uuid)}",device="nvidia{r.index}",modelName="{_escape(r.name)}",'
        f'hostname="{node}",Hostname="{node}",instance_id="{_escape(r.instance_id)}"'
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda found: "\n" if found[1] == "n" else found[1], text)


def read_dcgm(text: str) -> list[GpuReading]:
    """The readings in such a text, by node and index; other metrics are passed over. Raises ``ValueError``."""
    values: dict[tuple[str, int], dict[str, float]] = {}
    labels_of: dict[tuple[str, int], Mapping[str, str]] = {}
    for line in text.split("\n"):
        if (sample := _SAMPLE.match(line)) is None:
            continue
        labels = {name: _unescape(value) for name, value in _LABEL.findall(sample[2])}
        key = (labels.get("hostname") or labels.get("Hostname", ""), int(labels["gpu"]))
        labels_of[key] = labels
        values.setdefault(key, {})[sample[1]] = float(sample[3])
    return [_reading(key, labels_of[key], values[key]) for key in sorted(values)]


def _reading(key: tuple[str, int], labels: Mapping[str, str], values: Mapping[str, float]) -> GpuReading:
    clock_mhz, energy_mj = values.get("SM_CLOCK"), values.get("TOTAL_ENERGY_CONSUMPTION")
    events = values.get("CLOCKS_EVENT_REASONS")
    return GpuReading(
        node=key[0],
        index=key[1],
        uuid=labels.get("UUID", ""),
        name=labels.get("modelName", ""),
        sm_clock_mhz=None if clock_mhz is None else int(clock_mhz),
        power_w=values.get("POWER_USAGE"),
        energy_j=None if energy_mj is None else energy_mj / 1000.0,
        temperature_c=values.get("GPU_TEMP"),
        clock_events=None if events is None else ClockEvent.of_mask(int(events)),
        instance_id=labels.get("instance_id", ""),
    )

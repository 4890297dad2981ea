"""Measure what a bf16 Llama-shaped model takes on one real GPU: time and power of prefill and decode by batch size.

``python -m benchmarks.measure_h200 --out FILE.csv`` needs a GPU, its driver, and PyTorch (no dependency of this
project: install it beside it). It reads NVML and never sets anything: clocks are the GPU's default. Random weights, one
GPU, eager PyTorch: what a kernel draws does not depend on what it computes, but times are not an engine's.

No profile measured by this script ships yet: the shipped profiles are fitted to published measurements
(docs/profiles.md).
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from energy.adapters.nvml import Nvml
from energy.gpu import Gpu, GpuError
from energy.models import ModelArchitecture, model_architecture

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
FEED_FORWARD = 14336  # of its config.json
VOCABULARY = 128256
CELL_S = 6.0  # the counter ticks every 10 to 100 ms: the error of a cell is below 2 %
WARM_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure, again and again for some seconds."""

    phase: str  # prefill or decode
    batch: int
    new_tokens: int  # of each sequence, in one step
    context_tokens: int  # of each sequence, before the step


@dataclass(frozen=True, slots=True)
class Measured:
    """What one cell showed: a row of the CSV."""

    gpu: str
    model: str
    phase: str
    batch: int
    new_tokens: int
    context_tokens: int
    steps: int
    step_s: float
    power_w: float
    j_per_token: float
    sm_clock_mhz: int
    temperature_c: float


def plan(memory_bytes: float, architecture: ModelArchitecture) -> Iterator[Cell]:
    """Idle first, then prefill by length, then decode by batch and context, as far as the KV cache fits beside it all.

    A batch of 0 is the loaded, idle GPU.
    """
    room_tokens = (0.9 * memory_bytes - architecture.weight_bytes("bf16") - 4e9) / architecture.kv_bytes_per_token
    yield Cell("idle", 0, 0, 0)
    for tokens in (128, 512, 2048, 8192):
        yield Cell("prefill", 1, tokens, 0)
    for context_tokens in (512, 2048, 8192):
        for batch in (1, 4, 16, 64, 128, 256):
            if batch * context_tokens <= room_tokens:
                yield Cell("decode", batch, 1, context_tokens)


def measured(gpu: str, model: str, cell: Cell, steps: int, seconds: float, energy_j: float, now: Gpu) -> Measured:
    """A cell's row from its steps, seconds and counted joules. Raises ``ValueError`` where nothing was counted."""
    if steps < 1 or seconds <= 0.0 or energy_j <= 0.0:
        raise ValueError(f"{cell}: {steps} steps in {seconds:g} s counted {energy_j:g} J; is the energy counter alive?")
    tokens = max(1, steps * cell.batch * cell.new_tokens)
    return Measured(
        gpu=gpu,
        model=model,
        phase=cell.phase,
        batch=cell.batch,
        new_tokens=cell.new_tokens,
        context_tokens=cell.context_tokens,
        steps=steps,
        step_s=seconds / steps,
        power_w=energy_j / seconds,
        j_per_token=energy_j / tokens if cell.batch else 0.0,
        sm_clock_mhz=now.sm_clock_mhz(),
        temperature_c=now.temperature_c(),
    )


def run_cell(
    gpu: Gpu, model: str, cell: Cell, step: Callable[[], None], clock: Callable[[], float], cell_s: float = CELL_S
) -> Measured:
    """Repeat a step, first to warm up, then for ``cell_s`` between two readings of the energy counter."""
    _repeat(step, clock, WARM_UP_S)
    before_j = gpu.energy_j()
    steps, seconds = _repeat(step, clock, cell_s)
    return measured(gpu.name, model, cell, steps, seconds, gpu.energy_j() - before_j, gpu)


def _repeat(step: Callable[[], None], clock: Callable[[], float], for_s: float) -> tuple[int, float]:
    began_s, steps = clock(), 0
    while (passed_s := clock() - began_s) < for_s:
        step()
        steps += 1
    return steps, passed_s


class TorchLlama:
    """The model's matrices and attention on the GPU, in eager PyTorch."""

    def __init__(self, architecture: ModelArchitecture, device: str = "cuda") -> None:
        self._torch: Any = import_module("torch")  # not a dependency: only this script needs it
        self._a = architecture
        self._on = {"device": device, "dtype": self._torch.bfloat16}
        hidden, kv = architecture.hidden, architecture.kv_heads * architecture.head_size

        def weight(rows: int, columns: int) -> Any:
            return self._torch.randn(rows, columns, **self._on) * 0.02

        self._layers = [
            {
                "qkv": weight(hidden + 2 * kv, hidden),
                "out": weight(hidden, hidden),
                "gate_up": weight(2 * FEED_FORWARD, hidden),
                "down": weight(hidden, FEED_FORWARD),
            }
            for _ in range(architecture.layers)
        ]
        self._head = weight(VOCABULARY, hidden)

    def step_of(self, cell: Cell) -> Callable[[], None]:
        """What one step of this cell does, until the GPU is done."""
        torch, a = self._torch, self._a
        if cell.batch == 0:
            return lambda: time.sleep(0.1)
        shape = (cell.batch, a.kv_heads, cell.context_tokens + cell.new_tokens, a.head_size)
        caches = [torch.randn(2, *shape, **self._on) for _ in self._layers]
        start = torch.randn(cell.batch, cell.new_tokens, a.hidden, **self._on)

        def step() -> None:
            with torch.inference_mode():
                x = start
                for layer, cache in zip(self._layers, caches, strict=True):
                    x = self._layer(x, layer, cache, cell)
                torch.nn.functional.linear(x[:, -1], self._head).argmax(-1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return step

    def _layer(self, x: Any, layer: dict[str, Any], cache: Any, cell: Cell) -> Any:
        torch, a = self._torch, self._a
        linear, kv = torch.nn.functional.linear, a.kv_heads * a.head_size
        q, k, v = linear(self._norm(x), layer["qkv"]).split([a.hidden, kv, kv], dim=-1)

        def heads(part: Any, count: int) -> Any:
            return part.view(cell.batch, cell.new_tokens, count, a.head_size).transpose(1, 2)

        cache[0, :, :, cell.context_tokens :] = heads(k, a.kv_heads)
        cache[1, :, :, cell.context_tokens :] = heads(v, a.kv_heads)
        attended = torch.nn.functional.scaled_dot_product_attention(
            heads(q, a.heads), cache[0], cache[1], is_causal=cell.phase == "prefill", enable_gqa=True
        )
        x = x + linear(attended.transpose(1, 2).reshape(x.shape), layer["out"])
        gate, up = linear(self._norm(x), layer["gate_up"]).chunk(2, dim=-1)
        return x + linear(torch.nn.functional.silu(gate) * up, layer["down"])

    def _norm(self, x: Any) -> Any:
        return self._torch.nn.functional.rms_norm(x, (self._a.hidden,))


def write_rows(path: Path, rows: Sequence[Measured]) -> None:
    """All rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    """Measure every cell of the plan on GPU 0 and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure_h200", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--cell-s", type=float, default=CELL_S, help="seconds of each cell")
    given = parser.parse_args()
    architecture, rows = model_architecture(MODEL), []
    try:
        with Nvml() as nvml:
            gpu = nvml.gpus((0,))[0]
            model = TorchLlama(architecture)
            memory_bytes = model._torch.cuda.get_device_properties(0).total_memory
            for cell in plan(memory_bytes, architecture):
                rows.append(run_cell(gpu, MODEL, cell, model.step_of(cell), time.perf_counter, given.cell_s))
                print(rows[-1], file=sys.stderr)
    except (GpuError, ImportError) as error:
        parser.exit(2, f"measure_h200: {error}\n")
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()

"""The pure parts of the measuring script: what is planned, and what a row says. The GPU part needs a GPU."""

import csv

import pytest

from benchmarks.measure_h200 import MODEL, Cell, measured, plan, run_cell, write_rows
from energy.adapters.memory_gpu import MemoryGpu
from energy.gpus import gpu_physics
from energy.models import model_architecture

ARCHITECTURE = model_architecture(MODEL)
H200 = gpu_physics("H200-SXM")


def test_the_plan_fits_the_memory_and_begins_idle():
    cells = list(plan(H200.memory_bytes, ARCHITECTURE))
    assert cells[0] == Cell("idle", 0, 0, 0)
    assert {cell.phase for cell in cells} == {"idle", "prefill", "decode"}
    kv_bytes = [cell.batch * cell.context_tokens * ARCHITECTURE.kv_bytes_per_token for cell in cells]
    assert max(kv_bytes) + ARCHITECTURE.weight_bytes("bf16") < 0.9 * H200.memory_bytes
    assert max(cell.batch for cell in plan(24e9, ARCHITECTURE) if cell.context_tokens == 8192) < 64


def test_a_cells_row_is_counted_joules_over_measured_seconds():
    now_s = [0.0]
    gpu = MemoryGpu(0, H200, lambda: now_s[0])

    def step():
        now_s[0] += 0.25

    row = run_cell(gpu, MODEL, Cell("decode", 8, 1, 512), step, lambda: now_s[0], cell_s=5.0)
    assert (row.steps, row.step_s) == (20, 0.25)
    assert row.power_w == pytest.approx(H200.idle_w(H200.max_clock_mhz))
    assert row.j_per_token == pytest.approx(row.power_w * 0.25 / 8)
    assert (row.gpu, row.sm_clock_mhz) == ("H200-SXM", 1980)
    assert gpu.writes == 0, "it only reads"


def test_a_dead_counter_is_no_measurement(tmp_path):
    gpu = MemoryGpu(0, H200, lambda: 0.0)
    with pytest.raises(ValueError, match="is the energy counter alive"):
        measured("H200", MODEL, Cell("decode", 8, 1, 512), 10, 1.0, 0.0, gpu)
    row = measured("H200", MODEL, Cell("idle", 0, 0, 0), 10, 1.0, 75.0, gpu)
    write_rows(tmp_path / "rows.csv", [row])
    (read,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert (read["phase"], read["power_w"], read["j_per_token"]) == ("idle", "75.0", "0.0")

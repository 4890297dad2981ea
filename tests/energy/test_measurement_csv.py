"""The documented CSV and the public formats: read exactly, and every bad row named by file and line."""

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.adapters.measurement_csv import read_measurements
from energy.profile import ProfileError

HEADER = "gpu,model,tp,sm_clock_mhz,input_tokens,output_tokens,concurrency,ttft_s,tbt_s,power_w"
GOOD = "X1,some/model,2,1600,512,128,8,0.21,0.018,240"


def write(folder: Path, *lines: str, name: str = "sweep.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_row_is_read_as_it_stands(tmp_path):
    (row,) = read_measurements(write(tmp_path, HEADER, GOOD)).measurements
    assert (row.gpu, row.model, row.precision, row.tp, row.sm_clock_mhz) == ("X1", "some/model", "bf16", 2, 1600)
    assert (row.load.input_tokens, row.load.output_tokens, row.load.clients) == (512.0, 128.0, 8)
    assert (row.ttft_s, row.tpot_s, row.power_w) == (0.21, 0.018, 240.0)
    assert row.where.endswith("sweep.csv line 2")


def test_an_open_loop_row_is_a_closed_loop_of_as_many_in_flight(tmp_path):
    header = HEADER.replace("concurrency", "rate_rps")
    (row,) = read_measurements(write(tmp_path, header, GOOD)).measurements
    assert row.rate_rps == 8.0
    assert row.load.clients == round(8 * (0.21 + 127 * 0.018))


def test_gzip_blank_optionals_and_fp8_names_are_understood(tmp_path):
    path = tmp_path / "sweep.csv.gz"
    path.write_bytes(
        gzip.compress(f"{HEADER}\n{GOOD.replace('some/model', 'some/model-FP8').replace(',240', ',')}\n".encode())
    )
    (row,) = read_measurements(path).measurements
    assert row.precision == "fp8"
    assert row.power_w is None


BAD = {
    "ttft_s is 'soon', not a number": GOOD.replace("0.21", "soon"),
    "tbt_s is -1, it must be above 0": GOOD.replace("0.018", "-1"),
    "tbt_s is inf": GOOD.replace("0.018", "inf"),
    "tp is 3, not one of": GOOD.replace(",2,", ",3,"),
    "gpu is empty": GOOD.replace("X1", ""),
    "sm_clock_mhz is empty": GOOD.replace("1600", ""),
    "exactly one of concurrency and rate_rps": GOOD.replace(",8,", ",,"),
    "not as many cells": GOOD + ",7",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, reason):
    path = write(tmp_path, HEADER, GOOD, BAD[reason], GOOD)
    with pytest.raises(ProfileError) as raised:
        read_measurements(path)
    assert reason in str(raised.value)
    assert "sweep.csv line 3" in str(raised.value)


def test_many_bad_rows_are_counted_not_all_told(tmp_path):
    path = write(tmp_path, HEADER, *[GOOD.replace("0.21", "x")] * 9)
    with pytest.raises(ProfileError, match="and 4 more rows"):
        read_measurements(path)


def test_missing_columns_and_files_are_named(tmp_path):
    with pytest.raises(ProfileError, match="missing column tbt_s"):
        read_measurements(write(tmp_path, HEADER.replace("tbt_s", "itl"), GOOD))
    with pytest.raises(ProfileError, match="missing column concurrency or rate_rps"):
        read_measurements(write(tmp_path, HEADER.replace("concurrency", "users"), GOOD))
    with pytest.raises(ProfileError, match="no rows"):
        read_measurements(write(tmp_path, HEADER))
    with pytest.raises(ProfileError, match="cannot be read"):
        read_measurements(tmp_path / "nothing.csv")


@settings(deadline=None)
@given(st.lists(st.text(alphabet='ab,1.-"\n ', max_size=30), max_size=5))
def test_no_file_of_any_kind_escapes_as_another_error(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("any"), HEADER, *lines)
    try:
        rows = read_measurements(path).measurements
    except ProfileError:
        return
    assert all(row.ttft_s > 0 and row.tpot_s > 0 for row in rows)


AI_HEADER = (
    "backend,backend_version,model_path,system,precision,isl,osl,concurrency,tp_size,silicon_ttft_ms,silicon_tpot_ms,"
    "silicon_data_source"
)


def test_inferencemax_rows_carry_what_their_generator_did(tmp_path):
    row = "vllm,,meta-llama/Llama-3.1-70B,h100_sxm,fp8,1024,8192,16.0,4.0,121,13.2,x; measured=2025-10-29; wip=False"
    (read,) = read_measurements(write(tmp_path, AI_HEADER, row)).measurements
    assert (read.gpu, read.model, read.engine) == ("H100-SXM", "meta-llama/Llama-3.1-70B-Instruct", "vllm")
    assert (read.load.shortest_share, read.load.rounds, read.load.max_running) == (0.8, 10, 16)
    assert (read.ttft_s, read.tpot_s) == pytest.approx((0.121, 0.0132))


def test_tensorrt_rows_run_one_sequence_fewer_than_clients(tmp_path):
    row = "trtllm,1.0.0rc3,meta-llama/Llama-3.1-8B-Instruct,h100_sxm,,1024,128,8.0,1.0,190,7.9,other.csv"
    (read,) = read_measurements(write(tmp_path, AI_HEADER, row)).measurements
    assert (read.precision, read.load.max_running, read.load.shortest_share) == ("bf16", 7, 1.0)


SPLITWISE_HEADER = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time,"
    "tensor_parallel"
)


def test_splitwise_rows_become_medians_of_static_batches_and_zero_power_is_none(tmp_path):
    rows = [f"llama2-70b,a100-80gb,512,4,128,1.0,0.7,{ms},60,8000,2" for ms in (840, 850, 990)]
    rows += ["llama2-70b,h100-80gb,512,4,128,0.0,0.0,300,40,5000,2", "llama2-70b,a100-80gb,512,4,256,0,0,1,1,1,2"]
    rows += ["llama2-70b,a100-80gb,8192,1,128,1.0,0.18,2990,57,10300,2"]  # averaged over mostly idle time
    a100, h100, long = read_measurements(write(tmp_path, SPLITWISE_HEADER, *rows)).measurements
    assert (a100.ttft_s, a100.tpot_s, a100.power_w) == pytest.approx((0.85, 0.06, 280.0))
    assert (a100.load.clients, a100.load.rounds) == (4, 1)
    assert h100.power_w is None
    assert long.power_w is None


def test_ml_energy_rows_are_served_power_and_pipeline_parallel_ones_are_passed_over(tmp_path):
    header = "Model,GPU,TP,PP,Avg TPOT (s),Avg Output Tokens,Avg BS (reqs),avg_W_per_gpu"
    row = "meta-llama/Meta-Llama-3.1-70B-Instruct,NVIDIA H100 80GB HBM3,4,{pp},0.1,460,128,278"
    file = read_measurements(write(tmp_path, header, row.format(pp=1), row.format(pp=2)))
    (served,) = file.served_power
    assert (served.gpu, served.tp, served.sequences, served.power_w) == ("H100-SXM", 4, 128.0, 278.0)


PUBLIC = Path(os.environ.get("DYNAMOLLM_DATA") or Path(__file__).parents[3] / "shared" / "data") / "profiles"


@pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"the public measurements are not in {PUBLIC}")
def test_the_public_files_are_read_whole():
    ai = read_measurements(PUBLIC / "aiconfigurator_llama_h100_h200.csv").measurements
    assert len(ai) == 421
    splitwise = read_measurements(PUBLIC / "splitwise_perf_model.csv").measurements
    assert {m.gpu for m in splitwise} == {"A100-80GB-SXM", "H100-SXM"}
    assert all(m.power_w is None for m in splitwise if m.gpu == "H100-SXM")
    assert len(read_measurements(PUBLIC / "mlenergy_v2.csv").served_power) == 162

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import zstandard

from simulator.workload.adapters import location
from simulator.workload.adapters.azure import azure_trace
from simulator.workload.adapters.azure2024 import INPUT_FILE, OUTPUT_FILE, RATE_FILE, azure2024_code_week
from simulator.workload.adapters.catalogue import NAMED, POISSON_RATES_RPS, open_workload, trace_file
from simulator.workload.adapters.location import data_file
from simulator.workload.adapters.mooncake import mooncake_trace
from simulator.workload.adapters.servegen import servegen_week
from simulator.workload.adapters.vidur import vidur_lengths
from simulator.workload.arrivals import WorkloadError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109

2023-11-16 18:15:51.2224670,879,55
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30500, "input_length": 6472, "output_length": 26, "hash_ids": []}
"""


def written(tmp_path, text, name="trace.csv", zipped=False):
    path = tmp_path / name
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_azure_rows_become_seconds_since_the_first(tmp_path, zipped):
    workload = trace_file(written(tmp_path, AZURE, zipped=zipped))
    arrivals = workload.collect()
    assert arrivals.arrival_s == pytest.approx([0, 4.314579, 4.541877], abs=1e-5)
    assert arrivals.input_tokens.tolist() == [374, 396, 879]
    assert arrivals.output_tokens.tolist() == [44, 109, 55]
    assert workload.expected_requests == 3
    assert workload.starts_unix_s == pytest.approx(1700158546.68)
    assert workload.duration_s == pytest.approx(4.541877, abs=1e-5)


def test_azure_2024_timestamps_with_a_zone_are_read(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
    assert azure_trace(written(tmp_path, text)).starts_unix_s == pytest.approx(1715299200.00993)


@pytest.mark.parametrize("zipped", [False, True])
def test_mooncake_rows_are_in_milliseconds(tmp_path, zipped):
    arrivals = trace_file(written(tmp_path, MOONCAKE, "trace.jsonl", zipped)).collect()
    assert arrivals.arrival_s.tolist() == [0, 3.5]
    assert arrivals.input_tokens.tolist() == [6955, 6472]
    assert arrivals.output_tokens.tolist() == [52, 26]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("yesterday,374,44", "TIMESTAMP is not a date and time: 'yesterday'"),
        ("2023-11-16 18:15:52,many,44", "ContextTokens is not a number: 'many'"),
        ("2023-11-16 18:15:52,374,0", "GeneratedTokens must be a whole number of tokens >= 1, not '0'"),
        ("2023-11-16 18:15:52,-3,4", "ContextTokens must be"),
        ("2023-11-16 18:15:52,1.5,4", "ContextTokens must be"),
        ("2023-11-16 18:15:52,nan,4", "ContextTokens is not a number"),
        ("2023-11-16 18:15:52,99999999999,4", "ContextTokens must be"),
        ("2023-11-16 18:15:52,374", "has 2 columns, the header has 3"),
        ("2023-11-16 18:15:40,374,4", "before the row above it"),
    ],
)
def test_a_bad_azure_row_is_named_by_file_and_line(tmp_path, row, says):
    path = written(tmp_path, AZURE + row + "\n", zipped=True)
    with pytest.raises(WorkloadError) as raised:
        azure_trace(path)
    assert str(raised.value).startswith(f"{path}:6: ")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"timestamp": 31000, "input_length": 5', "is not a Mooncake request"),
        ('{"timestamp": 31000, "input_length": 5}', "output_length"),
        ('{"timestamp": "soon", "input_length": 5, "output_length": 1}', "timestamp"),
        ('{"timestamp": 31000, "input_length": 0, "output_length": 1}', "input_length must be"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "before the row above it"),
    ],
)
def test_a_bad_mooncake_row_is_named_by_file_and_line(tmp_path, row, says):
    path = written(tmp_path, MOONCAKE + row + "\n", "trace.jsonl")
    with pytest.raises(WorkloadError) as raised:
        mooncake_trace(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither a header"),
        (b"time,tokens\n1,2\n", "neither a header"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        (b"num_prefill_tokens,num_decode_tokens\n1,2\n", "without arrival times"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n\xff\xfe,1,2\n", ":2: is not UTF-8"),
        (gzip.compress(AZURE.encode() * 50)[:60], "damaged or cut short"),
    ],
)
def test_files_that_are_no_trace_say_so(tmp_path, content, says):
    path = written(tmp_path, content)
    with pytest.raises(WorkloadError, match=r"trace\.csv") as raised:
        trace_file(path)
    assert says in str(raised.value)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    assert len(trace_file(written(tmp_path, b"\xef\xbb\xbf" + AZURE.encode())).collect()) == 3


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(WorkloadError, match=r"azure-conv.*synthetic-week"):
        open_workload(str(tmp_path / "none.csv"))


def test_a_trace_file_is_scaled_by_seed(tmp_path):
    rows = "".join(f'{{"timestamp": {i * 100}, "input_length": 5, "output_length": 1}}\n' for i in range(400))
    path = written(tmp_path, rows, "t.jsonl")
    counts = [len(open_workload(str(path), seed, 0.5).collect()) for seed in range(3)]
    assert all(150 < count < 250 for count in counts)
    assert open_workload(str(path), 1, 3.0).expected_requests == 1200


def test_the_surge_is_busy_between_two_quiet_times():
    times_s = open_workload("surge", 0, 4.0).collect().arrival_s
    counts = [np.count_nonzero((times_s >= a) & (times_s < b)) for a, b in ((0, 180), (180, 330), (330, 540))]
    assert counts == [pytest.approx(n, rel=0.15) for n in (4 * 180, 4 * 8 * 150, 4 * 210)]
    assert times_s.max() < 540.0


def test_poisson_loads_need_no_file():
    for load, rate_rps in POISSON_RATES_RPS.items():
        assert open_workload(f"poisson-{load}", 0, 2.0).mean_rate_rps == pytest.approx(2 * rate_rps)


def test_vidur_lengths_are_pairs(tmp_path):
    path = written(tmp_path, "num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n2015,156,12.9\n")
    assert vidur_lengths(path).output_tokens.tolist() == [54, 156]
    with pytest.raises(WorkloadError, match=":3: has 1 columns"):
        vidur_lengths(written(tmp_path, "num_prefill_tokens,num_decode_tokens\n1,2\n3\n"))
    with pytest.raises(WorkloadError, match="header"):
        vidur_lengths(written(tmp_path, AZURE))


def week_files(folder, rates="1200,2400,600"):
    rows = "".join(f"2024-05-10T00:{7 * (i + 1):02d}:00,{rate}\n" for i, rate in enumerate(rates.split(",")))
    (folder / RATE_FILE).write_text("time_utc,req_per_min_scaled\n" + rows)
    (folder / INPUT_FILE).write_text("tokens,cdf_percent\n-4.7,1\n100,50\n1000,97\n")
    (folder / OUTPUT_FILE).write_text("tokens,cdf_percent\n-2,50\n20,100.06\n30,100.06\n")
    return folder


def test_the_digitised_week_is_cleaned_and_follows_its_curve(tmp_path):
    workload = azure2024_code_week(week_files(tmp_path), seed=1, rate_scale=2.0)
    arrivals = workload.collect()
    assert workload.expected_requests == pytest.approx(2 * 7 * (1.5 * 1200 + 2400 + 1.5 * 600))
    assert workload.starts_unix_s == 1715299200
    assert workload.duration_s == 4 * 420
    counts, _ = np.histogram(arrivals.arrival_s, [0, 630, 1050, 1680])
    assert counts == pytest.approx([25_200, 33_600, 12_600], rel=0.05)
    assert arrivals.input_tokens.min() == 1
    assert (arrivals.input_tokens == 1000).mean() == pytest.approx(0.03, abs=0.005)  # beyond the figure
    assert arrivals.output_tokens.max() <= 20
    assert (arrivals.output_tokens == 1).mean() == pytest.approx(0.51, abs=0.02)


def test_a_bad_point_of_the_digitised_week_is_named(tmp_path):
    with pytest.raises(WorkloadError, match=f"{RATE_FILE}:3: is not a number: 'x'"):
        azure2024_code_week(week_files(tmp_path, "1,x,3"), seed=0)
    with pytest.raises(WorkloadError, match="at least two points"):
        azure2024_code_week(week_files(tmp_path, "1"), seed=0)


def archive(path, members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"m-large/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    path.write_bytes(zstandard.compress(packed.getvalue()))
    return path


TRACE = "0,0.5,1.0,Gamma,1.0,2.0\n600,0,0,,0,0\n1200,1.0,2.0,Weibull,0.5,0.4\n"
DATASET = json.dumps({"0": {"input_tokens": "{100: 0.25, 200: 0.75}", "output_tokens": "{7: 1.0}"}})


def test_servegen_clients_are_read_from_the_archive(tmp_path):
    path = archive(
        tmp_path / "m-large.tar.zst",
        {
            "chunk-0-trace.csv": TRACE,
            "chunk-0-dataset.json": DATASET,
            "chunk-3-trace.csv": TRACE,
            "chunk-3-dataset.json": "{}",
            "notes.txt": "x",
        },
    )
    workload = servegen_week(path, seed=0)
    arrivals = workload.collect()
    assert workload.duration_s == 1800
    assert workload.expected_requests == len(arrivals) == 2 * (300 + 600)
    assert (arrivals.input_tokens == 200).mean() == pytest.approx(0.75, abs=0.05)
    assert set(arrivals.output_tokens) == {7}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"chunk-0-trace.csv": "0,1,1,Gamma\n"}, "chunk-0-trace.csv:1: has 4 columns"),
        ({"chunk-0-trace.csv": TRACE + "1800,x,1,Gamma,1,1\n"}, "chunk-0-trace.csv:4: is not a number"),
        ({"chunk-0-trace.csv": "0,1,1,Pareto,1,1\n"}, "Gamma, Weibull"),
        ({"chunk-0-dataset.json": '{"0": {}}'}, "length histograms"),
        ({"chunk-0-dataset.json": '{"0": {"input_tokens": "{a: 1}", "output_tokens": "{1: 1}"}}'}, "length histograms"),
        ({"other.txt": ""}, "no chunk-"),
    ],
)
def test_a_bad_servegen_member_is_named(tmp_path, members, says):
    with pytest.raises(WorkloadError) as raised:
        servegen_week(archive(tmp_path / "m.tar.zst", members), seed=0)
    assert says in str(raised.value)


def test_what_is_not_an_archive_says_so(tmp_path):
    with pytest.raises(WorkloadError, match="archive"):
        servegen_week(written(tmp_path, "hello", "m.tar.zst"), seed=0)
    with pytest.raises(WorkloadError, match="cannot be read"):
        servegen_week(tmp_path / "none.tar.zst", seed=0)


def test_data_is_found_by_variable_first(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "x.csv").write_text("")
    assert data_file("traces/x.csv", {location.VARIABLE: str(tmp_path)}) == tmp_path / "traces" / "x.csv"


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(WorkloadError) as raised:
        data_file("traces/AzureLLMInferenceTrace_conv.csv.gz", {location.VARIABLE: str(tmp_path)})
    for part in (str(tmp_path), "Azure/AzurePublicDataset", location.VARIABLE, "synthetic-conv"):
        assert part in str(raised.value)


def public(relative):
    try:
        return data_file(relative)
    except WorkloadError:
        pytest.skip(f"{relative} is not at hand: set {location.VARIABLE}")


@pytest.mark.parametrize(("kind", "requests", "span_s"), [("conv", 19_366, 3501.7), ("code", 8819, 3435.9)])
def test_the_public_azure_hours(kind, requests, span_s):
    public(f"traces/AzureLLMInferenceTrace_{kind}.csv.gz")
    workload = open_workload(f"azure-{kind}")
    assert len(workload.collect()) == requests
    assert workload.duration_s == pytest.approx(span_s, abs=0.1)


def test_the_shipped_statistics_are_those_of_the_public_hours():
    public("traces/AzureLLMInferenceTrace_conv.csv.gz")
    from simulator.workload.adapters.publish import hour_statistics
    from simulator.workload.adapters.published import published

    for kind in ("conv", "code"):
        assert hour_statistics(kind) == published(f"synthetic-{kind}")


def test_the_public_code_week_has_its_requests():
    public(f"traces/{RATE_FILE}")
    assert open_workload("azure-2024-code-week").expected_requests == pytest.approx(16_803_695, rel=0.001)
    assert open_workload("azure-2024-code-week").duration_s == 7 * 86_400
    arrivals = open_workload("azure-2024-code-day", 0, 0.01).collect()
    assert np.median(arrivals.output_tokens) < 20
    assert 1500 < np.median(arrivals.input_tokens) < 2500


def test_the_public_servegen_clients():
    path = public("traces/servegen_m-large_days0-6.tar.zst")
    workload = servegen_week(path, seed=0, rate_scale=0.001)
    assert workload.expected_requests == pytest.approx(126_735.05, rel=1e-6)
    assert workload.duration_s == 604_800
    first = next(workload.chunks())
    assert len(first) == pytest.approx(127, abs=15)


def test_every_name_makes_its_workload_or_says_which_file_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(location.os.environ, location.VARIABLE, str(tmp_path))
    for name, make in NAMED.items():
        if name.startswith(("poisson", "synthetic", "surge")):
            assert make(0, 0.01).expected_requests > 0
        else:
            with pytest.raises(WorkloadError, match=str(tmp_path)):
                make(0, 0.01)

"""Carbon intensity: static, hourly from a file, live."""

import asyncio
import gzip
import os
from pathlib import Path

import httpx
import pytest

from energy.adapters.carbon_electricity_maps import ElectricityMapsIntensity
from energy.adapters.carbon_file import read_hourly
from energy.carbon import CarbonError, HourlyIntensity, StaticIntensity, co2_g, intensity_of_region

NEW_YEAR_2022_S = 1_640_995_200.0


def test_a_region_has_its_grids_mean_and_its_source():
    oregon = intensity_of_region("us-west1")
    assert oregon.g_per_kwh(0.0) == oregon.g_per_kwh(1e9) == 94.0
    assert "CodeCarbon" in oregon.source
    assert co2_g(3.6e6, 94.0) == 94.0
    with pytest.raises(CarbonError, match=r"'atlantis'; known: africa-south1, .*us-west4"):
        intensity_of_region("atlantis")


def test_hours_repeat_by_whole_weeks_and_days():
    week = HourlyIntensity(0.0, tuple(range(170)), "test")
    assert [week.g_per_kwh(3600.0 * hour) for hour in (0, 169.5, 170, 168 + 168)] == [0, 169, 2, 0]
    assert week.g_per_kwh(-1.0) == 167
    day = HourlyIntensity(0.0, tuple(range(30)), "test")
    assert day.g_per_kwh(3600.0 * 49) == 1
    with pytest.raises(CarbonError, match="not one hour"):
        HourlyIntensity(0.0, (), "test")


def hourly_file(path, hours, column="avg_CI"):
    lines = [f"timestamp,WND,{column}"]
    lines += [f"2022-01-01 {hour:02d}:00:00+00:00,1.0,{value}" for hour, value in hours]
    path.write_bytes(gzip.compress("\n".join(lines).encode()) if path.suffix == ".gz" else "\n".join(lines).encode())
    return path


@pytest.mark.parametrize("name", ["hours.csv", "hours.csv.gz"])
def test_a_file_of_hours(tmp_path, name):
    hours = read_hourly(hourly_file(tmp_path / name, [(0, 222.3), (1, 260.9), (2, "")]))
    assert hours.begin_s == NEW_YEAR_2022_S
    assert hours.g_per_kwh(NEW_YEAR_2022_S + 5000.0) == 260.9
    assert hours.g_per_kwh(NEW_YEAR_2022_S + 3 * 3600.0 - 1.0) == 260.9, "an empty hour is as the one before"
    assert hours.source == name


@pytest.mark.parametrize(
    ("hours", "column", "message"),
    [
        ([(0, 1.0), (2, 1.0)], "avg_CI", r":3: 2022-01-01 02:00:00\+00:00 does not follow"),
        ([(0, "")], "avg_CI", ":2: could not convert"),
        ([(0, "much")], "avg_CI", ":2: could not convert"),
        ([(0, -5.0)], "avg_CI", ":2: -5 is no carbon intensity"),
        ([(0, 1.0)], "intensity", "there is no column 'avg_CI'"),
        ([], "avg_CI", "not one hour"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, hours, column, message):
    with pytest.raises(CarbonError, match=message):
        read_hourly(hourly_file(tmp_path / "hours.csv", hours, column))
    with pytest.raises(CarbonError, match="cannot be read"):
        read_hourly(tmp_path / "missing.csv")


def test_the_public_hours_of_california():
    folder = Path(os.environ.get("DYNAMOLLM_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
    path = folder / "carbon" / "CISO_hourly_avgCI.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: it is github.com/HewlettPackard/dc-rl's CISO_hourly_avgCI.csv, gzipped")
    hours = read_hourly(path)
    assert len(hours.hourly_g_per_kwh) == 8760
    assert hours.g_per_kwh(NEW_YEAR_2022_S) == pytest.approx(222.296, abs=1e-3)


def refreshed(answers, now_s):
    """What a source says at ``now_s`` after these answers, and the errors it met."""
    requests, errors = [], []

    def handler(request):
        requests.append(request)
        answer = answers[len(requests) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run():
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
            source = ElectricityMapsIntensity(client, "DE", "my-token", StaticIntensity(345.0, "fallback"))
            for _ in answers:
                try:
                    await source.refresh()
                except CarbonError as error:
                    errors.append(str(error))
            return source.g_per_kwh(now_s)

    return asyncio.run(run()), requests, errors


LATEST = {"zone": "DE", "carbonIntensity": 302, "datetime": "2022-01-01T00:00:00.000Z"}


def test_electricity_maps_is_asked_as_its_api_says():
    value, (request,), errors = refreshed([httpx.Response(200, json=LATEST)], NEW_YEAR_2022_S + 3600.0)
    assert (value, errors) == (302.0, [])
    assert str(request.url) == "https://api.electricitymaps.com/v3/carbon-intensity/latest?zone=DE"
    assert request.headers["auth-token"] == "my-token"


def test_what_was_heard_stays_until_it_is_stale():
    answers = [httpx.Response(200, json=LATEST), httpx.Response(500), httpx.ConnectError("no route")]
    answers += [httpx.Response(401), httpx.Response(200, json={"zone": "DE"})]
    value, _, errors = refreshed(answers, NEW_YEAR_2022_S + 3600.0)
    assert value == 302.0
    assert [error.split(": ", 1)[1].split(":")[0] for error in errors] == [
        "status 500",
        "ConnectError",
        "the token is wrong, or not for this zone (status 401)",
        "the answer is not understood",
    ]
    stale, _, _ = refreshed(answers, NEW_YEAR_2022_S + 7 * 3600.0)
    assert stale == 345.0
    assert refreshed([httpx.Response(500)], NEW_YEAR_2022_S)[0] == 345.0

"""The page says what the files say, and owns up to every rival that did better."""

import math
from pathlib import Path

import pytest

from benchmarks import predictors_page
from benchmarks.predictors_page import ALL_KNOWN, BOTH_PREDICTED, write_page
from benchmarks.simulation_report import read_json, write_json

PAGE = Path(__file__).parents[2] / "docs" / "predictors.md"
STORED = Path(predictors_page.__file__).parent / "results" / "predictors"


def length_row(name, **changes):
    row = {"accuracy": 0.8, "balanced": 0.7, "error_tokens": 50.0, "factor": 1.5, "covered": 0.8, "loss_j": 20.0}
    return {"name": name, **row, "p99_us": 90.0, "cpu_p50_us": 13.4, "cpu_p99_us": 41.0, **changes}


def load_row(name, **changes):
    return {"name": name, "error": 0.03, "under": 0.045, "over": 0.08, "pinball": 0.005, **changes}


def part_row(name, **changes):
    return {
        **load_row(name),
        "best": "last value",
        "best_over": 0.09,
        "best_pinball": 0.006,
        "bound_over": 0.05,
        **changes,
    }


def run_row(seed, known, kwh, in_slo):
    row = {"policy": "dynamollm", "known": known, "seed": seed, "kwh": kwh, "in_slo": in_slo, "ttft_p50_s": 0.2}
    return {**row, "ttft_p99_s": 1.0 + seed}


@pytest.fixture
def results(tmp_path):
    texts = [
        length_row("constant", covered=math.nan, error_tokens=50.001),
        length_row("product"),
        length_row("product, least cost", loss_j=1.0),
        length_row("rival", accuracy=0.9, error_tokens=49.999, loss_j=30.0),
    ]
    others = {key: [length_row("product")] for key in predictors_page.SETS[1:]}
    write_json(tmp_path / "lengths.json", {"commit": "aaa", "texts": texts, **others})
    trace = {
        "rows": [load_row("last value", over=0.0799), load_row("true mean", error=0.0), load_row("product")],
        "pools": [part_row("0"), part_row("1", under=0.051)],
        "classes": [part_row("5", under=0.118, best="template alone")],
        "half an hour": [
            load_row("EWMA 0.3"),
            load_row("Holt-Winters", pinball=0.004),
            load_row("product", over=0.184),
        ],
        "pinball": {"0.5": 0.0134, "0.955": 0.005},
    }
    loads = {"commit": "bbb", "azure-2024-code-week": trace, "servegen-week": trace}
    write_json(tmp_path / "loads.json", loads)
    runs = [
        run_row(1, ALL_KNOWN, 10.0, 0.99),
        run_row(2, ALL_KNOWN, 20.0, 0.97),
        run_row(1, BOTH_PREDICTED, 11.0, 0.995),
        run_row(2, BOTH_PREDICTED, 19.0, 0.985),
    ]
    write_json(tmp_path / "simulated.json", {"commit": "ccc", "conv-1h": runs})
    return tmp_path


def page_of(results):
    write_page(results, results / "page.md")
    return (results / "page.md").read_text()


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_no_mark_is_left_and_the_commits_are_named(results):
    text = page_of(results)
    assert "@@" not in text
    assert "lengths aaa, loads bbb, simulated ccc" in text


def test_every_number_stands_as_stored(results):
    text = page_of(results)
    assert cells(text, "rival") == ["90.0", "70.0", "50.0", "1.50", "80.0", "30.0", "13", "41", "90"]
    assert cells(text, "constant")[4] == ""  # it states no interval
    assert cells(text, "EWMA 0.3") == ["3.00", "4.50", "8.0", "0.500"]
    assert cells(text, "class ML") == ["3.00", "11.80", "8.0", "0.500", "template alone", "9.0", "0.600", "5.0"]
    assert cells(text, "pool of longer inputs")[1] == "5.10"
    assert "1.34 at 0.5, 0.50 at 0.955" in text


def test_rivals_that_are_better_are_named_even_by_a_hair(results):
    text = page_of(results)
    assert "in sizes right %: rival; in mean abs. error, tokens: rival." in text
    assert "in over %: last value." in text  # neither the bound nor the product's own variants are rivals
    assert "in pinball at 0.955, % of the mean: Holt-Winters." in text
    assert "Better than the product: none, in no column that compares." in text


def test_who_was_measured_on_every_set_is_compared_over_all_of_them(results):
    stored = read_json(results / "lengths.json")
    for n, kind in enumerate(predictors_page.SETS):
        stored[kind] = [length_row("product", loss_j=10.0 * n), length_row("boosted", loss_j=40.0)]
    stored["texts"].append(length_row("only there"))
    write_json(results / "lengths.json", stored)
    table = page_of(results).split("Means over the four sets")[1].split("By that")[0]
    assert cells(table, "boosted") == ["40.0", "50.0"]
    assert cells(table, "**product**") == ["15.0", "50.0"]
    assert "only there" not in table


def test_runs_are_compared_with_their_own_seed(results):
    line = next(line for line in page_of(results).splitlines() if BOTH_PREDICTED in line and line.startswith("| dyn"))
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == [
        "2", "15.00", "11.00 to 19.00", "+2.5", "-5.0 to +10.0", "99.00", "98.50", "0.200", "3.0",
    ]  # fmt: skip


def test_a_part_that_was_never_measured_is_named_with_its_command(results):
    (results / "loads.json").unlink()
    with pytest.raises(FileNotFoundError, match="--part loads"):
        page_of(results)


def test_the_notes_hold_every_mark_once():
    text = predictors_page.NOTES.read_text()
    traces = [f"{trace}{part}" for trace in ("code", "servegen") for part in ("", " parts", " half an hour")]
    for mark in (*predictors_page.SETS, *traces, "together", "simulated", "commits"):
        assert text.count(f"@@{mark}@@") == 1


def test_the_page_in_the_repository_is_what_its_files_make(tmp_path):
    page = tmp_path / "predictors.md"
    write_page(STORED, page)
    assert page.read_text() == PAGE.read_text()

"""Length and load prediction, measured: tables, plots and the numbers of docs/predictors.md.

    python -m benchmarks.predictors                          # all parts, then docs/predictors.md
    python -m benchmarks.predictors --part lengths,loads     # minutes on one core
    python -m benchmarks.predictors --part simulated --policies dynamollm-paper --seeds 1
    python -m benchmarks.predictors --part document          # the page, from what is stored

Libraries that are compared with (scikit-learn, LightGBM, river, statsmodels) are no dependencies of the product: one
that is not installed is left out, and that is said.
"""

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np

from benchmarks import length_contest, load_contest
from benchmarks.experiment import ENGINE, SEED
from benchmarks.experiment_capacity import experiment_capacity
from benchmarks.length_contest import Boosted, Confused, Constant, Contestant, Product, RiverLinear, Sample, SgdWords
from benchmarks.predictors_page import ALL_KNOWN, BOTH_PREDICTED, write_page
from benchmarks.simulation_report import commit, read_json, write_json
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile
from pools.length_costs import LengthCosts
from pools.lengths import LengthFeatures
from proxy.fields import read_chat
from simulator.experiment import Scenario, prepare
from simulator.prediction import TrueLengths
from simulator.simulation import simulate
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.adapters.location import data_file
from solver.load_history import DAY

RESULTS = Path(__file__).resolve().parent / "results" / "predictors"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "predictors.md"
PROFILE = "llama-3.1-70b-fp8-h100"
CONVERSATION = 6000  # requests of the hour: half an hour, and libraries that take a millisecond a request
NODES = 12  # of the conversation hour, as in benchmarks.experiment
SERVEGEN_SCALE = 0.15  # of its 212 requests/s: a twentieth of the time to draw it, and noisier minutes
LIBRARIES: Mapping[str, tuple[str, Callable[[], Contestant]]] = {
    "SGD": ("sklearn", SgdWords),
    "river": ("river", RiverLinear),
    "LightGBM": ("lightgbm", Boosted),
}
PARTS = ("lengths", "loads", "simulated", "document")


@click.command()
@click.option("--part", "parts", default=",".join(PARTS), show_default=True)
@click.option("--seeds", default="1,2,3,4,5,6", show_default=True, help="Of the simulated part.")
@click.option("--policies", default="dynamollm", show_default=True, help="Of the simulated part.")
def main(parts: str, seeds: str, policies: str) -> None:
    """Measure, print, store and plot."""
    measures: Mapping[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "lengths": lengths,
        "loads": loads,
        "simulated": lambda: simulated(policies.split(","), [int(seed) for seed in seeds.split(",")]),
    }
    source = commit()
    for part in parts.split(","):
        if part == "document":
            write_page(RESULTS, PAGE)
        else:
            for document in measures[part]():
                write_json(RESULTS / f"{part}.json", {"commit": source, **document})


def lengths() -> Iterator[dict[str, Any]]:
    """Requests with real output lengths: two sets that the product's steps were picked on, and two they were not."""
    costs = LengthCosts.of(load_capacity(PROFILE))
    proxy = _proxy_words()
    tables = {}
    conversation = _trace("conv")
    sets = {
        "texts": _texts(),
        "conversation": conversation[:CONVERSATION],
        "conversation, fresh": conversation[CONVERSATION : 2 * CONVERSATION],
        "code, fresh": _trace("code")[:CONVERSATION],
    }
    for name, samples in sets.items():
        truth = {sample.features: sample.output_tokens for sample in samples}
        makers: dict[str, Callable[[], Contestant]] = {
            "constant": lambda: Constant("median"),
            "max_tokens": lambda: Constant("cap"),
            "tenant mean": lambda: Constant("mean"),
            "product": lambda: Product(LengthCosts()),
            "product, without words": lambda: Product(LengthCosts(), words=False),
            "product, least cost": lambda: Product(costs),
        }
        if name == "texts":  # requests of the trace cannot be told apart, so nobody could know their answers
            makers["BERT proxy"] = lambda truth=truth: Confused(proxy, truth)  # type: ignore[misc]
        for library, (module, make) in LIBRARIES.items():
            if importlib.util.find_spec(module) is None:
                click.echo(f"{module} is not installed: left out")
            else:
                makers[library] = make
        rows = length_contest.contest(samples, makers, costs)
        tables[name] = length_contest.as_rows(rows)
        _print(f"{name}: {len(samples)} requests", tables[name])
    yield tables


def loads() -> Iterator[dict[str, Any]]:
    """Two weeks, of which the first four days teach."""
    tables: dict[str, Any] = {}
    for trace, scale in (("azure-2024-code-week", 1.0), ("servegen-week", SERVEGEN_SCALE)):
        workload = open_workload(trace, SEED, scale)
        minutes, starts_s = load_contest.minutes_of(workload), workload.starts_unix_s or 0.0
        rows = load_contest.as_rows(load_contest.contest(minutes, starts_s))
        pools = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])  # those of the policy dynamollm
        tables[trace] = {
            "rows": rows,
            "pools": load_contest.by_class(minutes, starts_s, pools),
            "classes": load_contest.by_class(minutes, starts_s, np.arange(9)),
            "half an hour": load_contest.as_rows(load_contest.contest(minutes, starts_s, 1800.0)),
            "pinball": {str(level): loss for level, loss in load_contest.pinballs(minutes, starts_s).items()},
        }
        for title, table in tables[trace].items():
            _print(f"{trace}, {title}", table if isinstance(table, list) else [table])
        _plot(minutes, starts_s, RESULTS / f"{trace}.png")
    yield tables


def simulated(names: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What each predictor does to energy and SLOs in the conversation hour, and what errors cost.

    Yields all there is after each run, what matters most first: a sweep that is cut short has said something.
    """
    profile = load_profile(PROFILE)
    capacity = experiment_capacity(profile, ENGINE, RESULTS.parent / "capacity", click.echo)
    base = Scenario(profile, capacity, NODES, limits=ENGINE, sample_s=10.0)
    calibration = read_json(RESULTS.parent / "calibration" / f"azure-conv--{PROFILE}--{NODES}.json")
    kinds: dict[str, dict[str, Any]] = {
        ALL_KNOWN: {"prediction": TrueLengths(), "known_loads": True},
        BOTH_PREDICTED: {},
        **{f"lengths {100 * a:.0f} % right": {"prediction": TrueLengths(a), "known_loads": True} for a in (0.6, 0.8)},
        "lengths predicted": {"known_loads": True},
        "loads predicted": {"prediction": TrueLengths()},
        **{f"lengths {100 * a:.0f} % right": {"prediction": TrueLengths(a), "known_loads": True} for a in (0.9, 0.7)},
    }
    table: list[dict[str, Any]] = []
    for policy in names:
        for name, changes in kinds.items():
            for seed in seeds:
                workload = open_workload("azure-conv", seed, calibration["rate_scale"])
                setup, controller = prepare(replace(base, **changes), policy, workload)
                run = simulate(setup, workload, controller, policy, seed)
                told = run.as_json()
                row = {"policy": policy, "known": name, "seed": seed, "kwh": run.energy_j / 3.6e6}
                row |= {"in_slo": run.slo_attainment, "ttft_p50_s": told["ttft_p50_s"]["all"]}
                table.append({**row, "ttft_p99_s": told["ttft_p99_s"]["all"]})
                click.echo(table[-1])
                yield {"conv-1h": table}


def _texts() -> list[Sample]:
    """ShareGPT-derived prompts of AIBrix's set in time order, put as a chat request and read as the gateway does."""
    samples = []
    with gzip.open(data_file("lengths/aibrix_prompts_with_output_length.jsonl.gz"), "rt") as lines:
        for line in lines:
            group = json.loads(line)
            for request in group["requests"]:
                body = {"model": "m", "messages": [{"role": "user", "content": request["prompt"]}]}
                fields = read_chat(json.dumps(body).encode())
                features = LengthFeatures("m", request["Prompt Length"], turn=fields.turn)
                samples.append(Sample(group["timestamp"] / 1000.0, features, request["Output Length"]))
    return samples


def _trace(kind: str) -> list[Sample]:
    """The Azure 2023 hour: sizes only."""
    arrivals = open_workload(f"azure-{kind}", SEED).collect()
    columns = (arrivals.arrival_s.tolist(), arrivals.input_tokens.tolist(), arrivals.output_tokens.tolist())
    return [Sample(at_s, LengthFeatures("m", inputs), outputs) for at_s, inputs, outputs in zip(*columns, strict=True)]


def _proxy_words() -> dict[int, Any]:
    """What the published BERT said of answers of each true size: the median length of those it put in that bucket."""
    with gzip.open(data_file("lengths/proxy_models_vicuna13b.csv.gz"), "rt") as lines:
        rows = [(int(row["output_token_length"]), int(row["predicted_length"])) for row in csv.DictReader(lines)]
    true, bucket = np.array(rows).T
    tokens = np.array([np.median(true[bucket == b]) for b in range(bucket.max() + 1)])[bucket]
    size = np.searchsorted(length_contest.CUTS.output_tokens, true, side="right")
    named = np.searchsorted(length_contest.CUTS.output_tokens, tokens, side="right")
    click.echo(f"BERT proxy on its own {len(true)} answers: {(size == named).mean():.3f} of three sizes right")
    return {k: tokens[size == k] for k in range(3)}


def _print(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    click.echo(f"\n{title}")
    click.echo(" | ".join(rows[0]))
    for row in rows:
        click.echo(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


def _plot(minutes: Any, starts_s: float, path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    forecasts = load_contest.product(minutes, starts_s, 300.0)[1].sum(axis=2)
    days = np.arange(len(forecasts)) / DAY
    shown = slice(load_contest.TAUGHT_DAYS * DAY, (load_contest.TAUGHT_DAYS + 1) * DAY)
    peaks = minutes.sum(axis=1).reshape(-1, load_contest.PER_SLOT).max(axis=1) / load_contest.MINUTE_S
    figure, axes = plt.subplots(figsize=(10, 4))
    axes.plot(days[shown], peaks[shown], lw=1, label="busiest minute")
    axes.plot(days[shown], forecasts[shown, 0], lw=1, label="mean forecast")
    axes.plot(days[shown], forecasts[shown, 1], lw=1, label="reserve")
    axes.set(xlabel="day", ylabel="requests/s", title="Five minutes ahead, the first day that counts")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()

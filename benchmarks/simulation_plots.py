"""Plots of simulated runs as the paper's figures show them: power, GPUs, TP mix and clocks over time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.simulation_report import file_name
from simulator.results import RunResult

COLOURS = ("#4c4c4c", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")
TP_COLOURS = {1: "#d9d9d9", 2: "#c6dbef", 4: "#6baed6", 8: "#2171b5"}


def plot_runs(runs: Sequence[RunResult], folder: Path) -> Path:
    """One figure of all runs and, for the last, its TP mix; returns its path."""
    figure, axes = plt.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    scale, unit = _time_unit(runs[0])
    for run, colour in zip(runs, COLOURS, strict=False):
        series = run.series
        at = series.at_s / scale
        axes[0].plot(at, series.power_w / 1000, label=run.policy, color=colour, linewidth=1)
        axes[1].plot(at, series.gpus_on, label=run.policy, color=colour, linewidth=1)
        axes[2].plot(at, series.clock_mhz, label=run.policy, color=colour, linewidth=1)
    _label(axes[0], "cluster power, kW")
    _label(axes[1], "GPUs on")
    _label(axes[2], "mean SM clock, MHz")
    axes[0].legend(ncols=4, fontsize=8, loc="upper left")
    _tp_mix(axes[3], runs[-1], scale)
    axes[3].set_xlabel(f"time, {unit}")
    figure.suptitle(f"{runs[0].workload}, {runs[0].gpus} GPUs, {runs[0].profile}")
    path = folder / f"{file_name(runs[0].workload)}--{runs[0].profile}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _tp_mix(axes: Axes, run: RunResult, scale: float) -> None:
    series = run.series
    tps = sorted(series.gpus_by_tp)
    axes.stackplot(
        series.at_s / scale,
        *(series.gpus_by_tp[tp] for tp in tps),
        labels=[f"TP{tp}" for tp in tps],
        colors=[TP_COLOURS.get(tp, "#08306b") for tp in tps],
        step="post",
    )
    rate = axes.twinx()
    rate.plot(series.at_s / scale, series.rate_rps, color="black", linewidth=0.7)
    rate.set_ylabel("requests/s")
    rate.set_ylim(bottom=0)
    axes.legend(ncols=4, fontsize=8, loc="upper left")
    _label(axes, f"GPUs by TP, {run.policy}")


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.margins(x=0)


def _time_unit(run: RunResult) -> tuple[float, str]:
    last_s = float(np.max(run.series.at_s, initial=1.0))
    if last_s > 2 * 86_400:
        return 86_400.0, "days"
    return (3600.0, "h") if last_s > 7200 else (60.0, "min")

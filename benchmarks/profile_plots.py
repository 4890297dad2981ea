"""Plots of a capacity table: latency and power over load, energy over clock, and the heat map of all nine classes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.profile_view import energy_grid, rate_of_tokens
from energy.capacity import CapacityTable

TP_COLOURS = {1: "#7f7f7f", 2: "#1b9e77", 4: "#d95f02", 8: "#7570b3", 16: "#e7298a"}
INFEASIBLE = "#d9d9d9"
DPI = 110


PLOTS = ("ttft", "tbt", "power", "energy", "heatmap")


def save_plots(table: CapacityTable, folder: Path, tokens_per_s: float, wanted: Sequence[str] = PLOTS) -> list[Path]:
    """Write the wanted plots of the table; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in wanted:
        path = folder / f"{table.profile}-{name}.png"
        figure_of(table, name, tokens_per_s).savefig(path, dpi=DPI, metadata={"Software": None})
        paths.append(path)
    return paths


def figure_of(table: CapacityTable, name: str, tokens_per_s: float) -> Figure:
    """One of ``PLOTS``; the energy plots are at this load of one instance."""
    if name == "ttft":
        return latency_figure(table, "ttft_p99", "P99 TTFT, s", lambda k: table.classes[k].ttft_slo_s)
    if name == "tbt":
        return latency_figure(table, "tbt_p99", "P99 TBT, s", lambda k: table.classes[k].tbt_slo_s)
    if name == "power":
        return power_figure(table)
    return energy_figure(table, tokens_per_s) if name == "energy" else heatmap_figure(table, tokens_per_s)


def _grid(title: str, height: float = 9.0) -> tuple[Figure, Iterator[tuple[int, Axes]]]:
    figure = Figure(figsize=(13, height), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(3, 3)
    return figure, ((3 * row + column, axes[row][column]) for row in range(3) for column in range(3))


def latency_figure(table: CapacityTable, quantity: str, label: str, slo_s: Callable[[int], float]) -> Figure:
    """A latency over the rate of one instance, at the highest clock (solid) and at the middle one (dashed)."""
    clocks = (len(table.sm_clocks_mhz) - 1, len(table.sm_clocks_mhz) // 2)
    shown = " and ".join(f"{table.sm_clocks_mhz[i]} MHz" for i in clocks)
    figure, grid = _grid(f"{table.profile}: {label} over load, {shown} (dashed)")
    for k, axes in grid:
        for t, tp in enumerate(table.tps):
            for i, style in zip(clocks, ("-", "--"), strict=True):
                highest = table.max_rate[t, i, k]
                if highest > 0:
                    rates = np.asarray(table.loads) * highest
                    values = getattr(table, quantity)[t, i, k]
                    axes.plot(rates, values, style, color=TP_COLOURS[tp], label=f"TP{tp}" if style == "-" else None)
        axes.axhline(slo_s(k), color="black", linewidth=0.8, linestyle=":")
        axes.annotate("SLO", (1, slo_s(k)), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set_title(table.classes[k].label, fontsize=10)
        axes.set_ylim(0, slo_s(k) * 1.15)
        axes.set_xlim(left=0)
        _labels(axes, k, "requests/s on one instance", label)
    return figure


def power_figure(table: CapacityTable) -> Figure:
    """Power of an instance over its rate, at the lowest, a middle and the highest clock."""
    last = len(table.sm_clocks_mhz) - 1
    clocks = {0: ":", last // 2: "--", last: "-"}
    shown = ", ".join(f"{table.sm_clocks_mhz[i]} ({style})" for i, style in clocks.items())
    figure, grid = _grid(f"{table.profile}: power of one instance over load at {shown} MHz")
    for k, axes in grid:
        for t, tp in enumerate(table.tps):
            for i, style in clocks.items():
                if table.max_rate[t, i, k] > 0:
                    rates = np.asarray(table.loads) * table.max_rate[t, i, k]
                    label = f"TP{tp}" if style == "-" else None
                    axes.plot(rates, table.power[t, i, k], style, color=TP_COLOURS[tp], label=label)
        axes.set_title(table.classes[k].label, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        _labels(axes, k, "requests/s on one instance", "W, all GPUs of it")
    return figure


def energy_figure(table: CapacityTable, tokens_per_s: float) -> Figure:
    """J per request over the clock: at a given load (solid, where it holds the SLO) and at the highest (dotted)."""
    figure, grid = _grid(
        f"{table.profile}: energy per request over SM clock, at {tokens_per_s:.0f} tokens/s on one instance\n"
        "(solid) and at its highest rate within the SLO (dotted); star = least energy, grey = no TP within the SLO"
    )
    clocks = np.asarray(table.sm_clocks_mhz)
    for k, axes in grid:
        energy = energy_grid(table, k, rate_of_tokens(table, k, tokens_per_s))
        at_most = energy_grid(table, k, None)
        for t, tp in enumerate(table.tps):
            axes.plot(clocks, energy[t], "o-", color=TP_COLOURS[tp], label=f"TP{tp}", markersize=4)
            axes.plot(clocks, at_most[t], ":", color=TP_COLOURS[tp])
        _mark_least(axes, clocks, energy)
        for i in np.flatnonzero(~np.isfinite(energy).any(axis=0)):
            axes.axvspan(*_around(clocks, int(i)), color=INFEASIBLE, alpha=0.6, linewidth=0)
        axes.set_title(table.classes[k].label, fontsize=10)
        finite = np.concatenate([energy[np.isfinite(energy)], at_most[np.isfinite(at_most)]])
        if finite.size:
            axes.set_ylim(0, 1.1 * np.quantile(finite, 0.98))
        _labels(axes, k, "SM clock, MHz", "J per request")
    return figure


def _mark_least(axes: Axes, clocks: np.ndarray, energy: np.ndarray) -> None:
    if np.isfinite(energy).any():
        t, i = np.unravel_index(np.nanargmin(np.where(np.isfinite(energy), energy, np.nan)), energy.shape)
        axes.plot(clocks[i], energy[t, i], "*", color="black", markersize=12, zorder=5)


def _around(clocks: np.ndarray, i: int) -> tuple[float, float]:
    """From half-way to the clock before to half-way to the next."""
    low = clocks[0] - 50 if i == 0 else (clocks[i - 1] + clocks[i]) / 2
    high = clocks[-1] + 50 if i == len(clocks) - 1 else (clocks[i] + clocks[i + 1]) / 2
    return float(low), float(high)


def heatmap_figure(table: CapacityTable, tokens_per_s: float) -> Figure:
    """The paper's heat-map tables: J per request by TP and clock, a class each, at one load; grey misses the SLO."""
    figure, grid = _grid(
        f"{table.profile}: J per request at {tokens_per_s:.0f} tokens/s on one instance; grey = SLO missed, "
        "frame = least energy",
        height=7.5,
    )
    for k, axes in grid:
        rate_rps = rate_of_tokens(table, k, tokens_per_s)
        energy = energy_grid(table, k, rate_rps)
        finite = energy[np.isfinite(energy)]
        axes.set_facecolor(INFEASIBLE)
        if finite.size:
            shown = np.ma.masked_invalid(energy)
            axes.imshow(shown, aspect="auto", cmap="YlOrRd", vmin=finite.min() * 0.8, vmax=finite.max() * 1.3)
            t, i = np.unravel_index(np.argmin(energy), energy.shape)
            axes.add_patch(Rectangle((i - 0.5, t - 0.5), 1, 1, fill=False, linewidth=2.5))
        for (t, i), value in np.ndenumerate(energy):
            axes.text(i, t, f"{value:.0f}" if np.isfinite(value) else "–", ha="center", va="center", fontsize=8)
        axes.set_xlim(-0.5, energy.shape[1] - 0.5)
        axes.set_ylim(energy.shape[0] - 0.5, -0.5)
        axes.set_xticks(range(len(table.sm_clocks_mhz)), [str(clock) for clock in table.sm_clocks_mhz], fontsize=8)
        axes.set_yticks(range(len(table.tps)), [f"TP{tp}" for tp in table.tps], fontsize=8)
        axes.set_title(f"{table.classes[k].label}, {rate_rps:.2f} requests/s", fontsize=10)
    return figure


def _labels(axes: Axes, k: int, x: str, y: str) -> None:
    if k >= 6:
        axes.set_xlabel(x, fontsize=9)
    if k % 3 == 0:
        axes.set_ylabel(y, fontsize=9)
    if k == 0:
        axes.legend(fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)

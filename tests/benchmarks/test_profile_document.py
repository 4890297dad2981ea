"""docs/profiles.md is what the committed command writes from the shipped files, and its anchors hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.profile_anchors import anchors
from benchmarks.profile_document import DOCUMENT_PLOTS, PLOTTED, TARGETS, document_text
from benchmarks.profile_plots import PLOTS, figure_of
from benchmarks.profile_table import TRIED_RESULTS
from benchmarks.profile_view import PAPER_TOKENS_PER_S, energy_grid, least, rate_of_tokens
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_fitted, profile_names

DOCS = Path(__file__).parents[2] / "docs"


def test_the_document_is_up_to_date():
    tried = json.loads(TRIED_RESULTS.read_text())
    assert (DOCS / "profiles.md").read_text() == document_text(tried), "stale: run `make profiles`"
    for name in PLOTTED:
        for plot in DOCUMENT_PLOTS:
            assert (DOCS / "profiles" / f"{name}-{plot}.png").is_file()


def test_every_shipped_profile_stands_in_the_error_table_and_misses_are_marked():
    text = (DOCS / "profiles.md").read_text()
    for name in profile_names():
        errors = load_fitted(name).provenance.errors
        assert f"`{name}`" in text
        for column, value in errors.items():
            if value > TARGETS[column.split("_")[0]]:
                assert f"**{100 * value:.1f} %**" in text
        assert errors, f"{name} has no cross-validated errors"


def test_energy_over_clock_is_u_shaped_for_long_requests_on_the_papers_model():
    table = load_capacity("llama-2-70b-h100")
    energy = energy_grid(table, 8, None)[table.tps.index(8)]
    at = int(np.argmin(energy))
    assert 1400 <= table.sm_clocks_mhz[at] <= 1700
    assert energy[0] > 1.05 * energy[at] < energy[-1]


def test_short_requests_are_cheapest_on_few_gpus_and_classes_differ_tenfold():
    table = load_capacity("llama-2-70b-h100")
    points = [least(energy_grid(table, k, rate_of_tokens(table, k, PAPER_TOKENS_PER_S)), table) for k in range(9)]
    assert points[0][0] == 2
    assert max(p[2] for p in points) / min(p[2] for p in points) > 10


def test_every_anchor_has_both_sides_and_a_role():
    found = anchors()
    assert len(found) >= 12
    assert all(a.what and a.source and a.published and a.ours for a in found)
    assert {a.role for a in found} == {"check", "input"}


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_has_a_panel_for_each_class_with_something_in_it(plot):
    figure = figure_of(load_capacity("llama-3.1-70b-fp8-h100"), plot, PAPER_TOKENS_PER_S)
    assert len(figure.axes) == 9
    assert all(axes.lines or axes.images for axes in figure.axes)
    assert {axes.get_title()[:2] for axes in figure.axes} == {"SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"}

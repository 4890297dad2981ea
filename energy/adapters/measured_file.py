"""A CSV of a user's own sweep as a profile: looked up where it was measured, fitted elsewhere."""

from pathlib import Path

from energy.adapters.measurement_csv import read_measurements
from energy.fit import FitRequest, fit_profile
from energy.measured import MeasuredProfile


def load_measured(path: Path) -> MeasuredProfile:
    """Read and fit one CSV of one GPU, model and precision.

    Raises ``ProfileError`` naming bad lines, or what the rows do not carry.
    """
    rows = read_measurements(path).measurements
    report = fit_profile(FitRequest(path.stem, rows, cross_validate=False))
    return MeasuredProfile(report.profile, tuple(rows))

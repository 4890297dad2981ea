"""MeasuredProfile: a user's own sweep, looked up inside its hull; outside it, and for single steps, a fit of the same.

Means between measured points are interpolated linearly in the logarithms of lengths and concurrency and in the clock.
Every answer says whether it lies inside what was measured. Pure: the CSV is read in ``energy/adapters``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import QhullError

from energy.closed_loop import LoadShape, closed_loop
from energy.fitted import FittedProfile
from energy.measurements import Measurement
from energy.profile import GpuState, StepCoefficients

Floats = NDArray[np.float64]

_VALUES = ("ttft_s", "tpot_s", "power_w")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one instance does under a load: means, and power per GPU."""

    ttft_s: float
    tpot_s: float
    power_w: float
    inside_hull: bool  # measured and interpolated; otherwise from the fit


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of one TP: the axes that vary, where each constant axis lies, and the interpolator."""

    varying: tuple[int, ...]
    constants: dict[int, float]
    points: Floats  # (rows, varying axes)
    values: Floats  # (rows, 3)
    interpolate: LinearNDInterpolator | None  # None with one varying axis, or none

    def at(self, point: Floats) -> Floats | None:
        """Values at a point on all axes; None outside the hull."""
        if any(not np.isclose(point[axis], value) for axis, value in self.constants.items()):
            return None
        wanted = point[list(self.varying)]
        if self.interpolate is not None:
            found = np.asarray(self.interpolate(wanted[None, :]))[0]
            return None if np.isnan(found).any() else found
        if not self.varying:
            return np.asarray(self.values.mean(axis=0))
        axis = self.points[:, 0]
        if not axis.min() - 1e-9 <= wanted[0] <= axis.max() + 1e-9:
            return None
        order = np.argsort(axis)
        return np.array([np.interp(wanted[0], axis[order], column[order]) for column in self.values.T])


def _table(rows: Sequence[Measurement], max_clock_mhz: int) -> _Table | None:
    """The rows of one TP ready for interpolation; None if they span no hull."""
    points = np.array([_point(m, m.sm_clock_mhz or max_clock_mhz) for m in rows])
    values = np.array([[getattr(m, name) for name in _VALUES] for m in rows], dtype=float)
    varying = tuple(axis for axis in range(points.shape[1]) if np.ptp(points[:, axis]) > 0)
    constants = {axis: float(points[0, axis]) for axis in range(points.shape[1]) if axis not in varying}
    chosen = points[:, list(varying)]
    interpolate = None
    if len(varying) > 1:
        try:
            interpolate = LinearNDInterpolator(chosen, values, rescale=True)
        except (QhullError, ValueError):  # too few points, or all on one line
            return None
    return _Table(varying, constants, chosen, values, interpolate)


def _point(m: Measurement, sm_clock_mhz: float) -> tuple[float, float, float, float]:
    return (
        float(np.log(m.load.input_tokens)),
        float(np.log(m.load.output_tokens)),
        float(np.log(m.load.clients)),
        float(sm_clock_mhz),
    )


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """A measured table with the fit of the same rows behind it; an ``EnergyProfile``."""

    fit: FittedProfile
    rows: tuple[Measurement, ...]
    _tables: dict[int, _Table] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for tp in self.fit.tensor_parallel:
            complete = [m for m in self.rows if m.tp == tp and None not in (m.ttft_s, m.tpot_s, m.power_w)]
            table = _table(complete, self.fit.physics.max_clock_mhz) if complete else None
            if table:
                self._tables[tp] = table

    @property
    def name(self) -> str:
        """Name of the profile."""
        return self.fit.name

    @property
    def model(self) -> str:
        """Model it was measured with."""
        return self.fit.model

    @property
    def gpu(self) -> str:
        """GPU it was measured on."""
        return self.fit.gpu

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """TPs that were measured, ascending."""
        return self.fit.tensor_parallel

    @property
    def sm_clocks_mhz(self) -> tuple[int, ...]:
        """Clocks to offer, ascending."""
        return self.fit.sm_clocks_mhz

    def step(self, tp: int, sm_clock_mhz: float) -> StepCoefficients:
        """Coefficients of a step, from the fit. Raises ``ProfileRangeError`` outside its range."""
        return self.fit.step(tp, sm_clock_mhz)

    def kv_capacity_tokens(self, tp: int) -> int:
        """Tokens of KV cache of one instance."""
        return self.fit.kv_capacity_tokens(tp)

    def idle_power_w(self, state: GpuState, sm_clock_mhz: float) -> float:
        """Power of one GPU that runs no step, in watts."""
        return self.fit.idle_power_w(state, sm_clock_mhz)

    def read(self, tp: int, sm_clock_mhz: float, input_tokens: float, output_tokens: float, clients: int) -> Reading:
        """Mean TTFT, TPOT and power of one instance under a closed loop. Raises ``ProfileRangeError`` off its range."""
        c = self.fit.step(tp, sm_clock_mhz)
        load = LoadShape(input_tokens, output_tokens, clients)
        point = np.array([np.log(input_tokens), np.log(output_tokens), np.log(clients), sm_clock_mhz])
        table = self._tables.get(tp)
        found = table.at(point) if table else None
        if found is not None:
            return Reading(float(found[0]), float(found[1]), float(found[2]), inside_hull=True)
        loop = closed_loop(c, load)
        power_w = (
            c.idle_w
            + c.active_w * loop.kernels_share
            + c.compute_w * loop.compute_share
            + c.memory_w * loop.memory_share
        )
        return Reading(loop.ttft_s, loop.tpot_s, min(power_w, c.max_w), inside_hull=False)

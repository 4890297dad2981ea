"""least_energy: joules below which no policy can do given work on these engines, whatever it knows or changes. Pure.

All useful work is done in engine steps, and a step has a price: so much time at so much power. A policy that knows
everything, pays for no change and never idles would still have to buy its steps, at best fractions of the best ones.
So the least energy is a linear program over step shapes: which steps, how often, so that all prompt tokens, attention
pairs, decoded tokens and context tokens of the workload are covered. SLOs, arrival times, instances and nodes are left
out, which can only lower it: the bound holds for every policy, also for one that misses every deadline.

Its duals are prices of a prompt token, an attention pair, a decoded token and a context token. By weak duality the work
at those prices is a bound as soon as no step is cheaper than its content. Shapes are looked at on a grid, so the prices
are lowered by what the worst step of a finer grid falls short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from energy.profile import StepCoefficients, step_power_w, step_time_s
from solver.control import FloatArray

_KINDS = 4
_COARSE, _FINE = (12, 8, 14, 8), (20, 14, 30, 14)  # points of a grid: prompt tokens, attention, sequences, context
_ENTERING = 64  # steps that join the program in a round, the most underpriced
_TIGHT = 1e-7  # relative; a step that is underpriced by less is not
_ROUNDS = 200
_SEARCHED, _SEARCH_ROUNDS, _FIRST_REACH = 40, 25, 1.25  # shapes of each engine, and how far around them at first
_NEIGHBOURS = np.array(list(product((-1.0, 0.0, 1.0), repeat=_KINDS)))


@dataclass(frozen=True, slots=True)
class Work:
    """What requests ask engines to compute, however they are batched."""

    prompt_tokens: float = 0.0
    attention_tokens2: float = 0.0  # pairs of prompt tokens
    decode_tokens: float = 0.0  # output tokens but the first, which comes with the prompt
    context_tokens: float = 0.0  # read for them
    longest_tokens: float = 1.0  # input and output of the longest request

    @staticmethod
    def of(input_tokens: npt.ArrayLike, output_tokens: npt.ArrayLike) -> "Work":
        """The work of requests with these lengths, each (n,)."""
        i, later = np.asarray(input_tokens, dtype=np.float64), np.asarray(output_tokens, dtype=np.float64) - 1.0
        if not i.size:
            return Work()
        return Work(
            prompt_tokens=float(i.sum()),
            attention_tokens2=float(0.5 * (i * i).sum()),
            decode_tokens=float(later.sum()),
            context_tokens=float((later * i + 0.5 * later * (later + 1.0)).sum()),
            longest_tokens=float((i + later + 1.0).max()),
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.prompt_tokens + other.prompt_tokens,
            self.attention_tokens2 + other.attention_tokens2,
            self.decode_tokens + other.decode_tokens,
            self.context_tokens + other.context_tokens,
            max(self.longest_tokens, other.longest_tokens),
        )

    @property
    def amounts(self) -> FloatArray:
        """(4,) in the order of prices."""
        return np.array([self.prompt_tokens, self.attention_tokens2, self.decode_tokens, self.context_tokens])


@dataclass(frozen=True, slots=True)
class StepEngine:
    """An instance at one clock, as far as its steps go."""

    gpus: int
    step: StepCoefficients
    step_tokens: int  # tokens of a step at most
    max_seqs: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class LeastEnergy:
    """The bound and what proves it."""

    energy_j: float
    prices_j: FloatArray  # (4,) of a prompt token, an attention pair, a decoded and a context token


def least_energy(work: Work, engines: Sequence[StepEngine]) -> LeastEnergy:
    """A lower bound on the energy of that work on any number of those engines."""
    amounts = work.amounts
    asked = amounts > 0.0
    if not asked.any():
        return LeastEnergy(0.0, np.zeros(_KINDS))
    content, energy_j = _steps(engines, work.longest_tokens, _COARSE)
    prices = np.zeros(_KINDS)
    prices[asked] = _prices(content[:, asked], energy_j, amounts[asked])
    worst = min(_worst_cover(engine, work.longest_tokens, prices) for engine in engines)
    prices *= min(worst, 1.0)
    return LeastEnergy(float(prices @ amounts), prices)


def step_energy_j(engine: StepEngine, content: FloatArray) -> FloatArray:
    """(n,) joules of steps that hold these (n, 4) prompt tokens, attention pairs, decoded and context tokens."""
    columns: Any = content.T  # the two functions take floats and arrays alike
    time_s, power_w = step_time_s(engine.step, *columns), step_power_w(engine.step, *columns)
    return np.asarray(engine.gpus * time_s * power_w)


def _steps(
    engines: Sequence[StepEngine], longest_tokens: float, points: tuple[int, int, int, int]
) -> tuple[FloatArray, FloatArray]:
    """(S, 4) content and (S,) energy of steps of all shapes that the engines can do."""
    contents = [_content(engine, longest_tokens, _grid(engine, longest_tokens, points)) for engine in engines]
    energies = [step_energy_j(engine, content) for engine, content in zip(engines, contents, strict=True)]
    return np.vstack(contents), np.concatenate(energies)


def _worst_cover(engine: StepEngine, longest_tokens: float, prices: FloatArray) -> float:
    """The least energy of a step by the worth of its content, over all shapes of this engine."""

    def cover(shapes: FloatArray) -> FloatArray:
        content = _content(engine, longest_tokens, shapes)
        worth: FloatArray = content @ prices
        covered = np.full(len(worth), np.inf)
        np.divide(step_energy_j(engine, content), worth, out=covered, where=worth > 0.0)
        return covered

    shapes = _grid(engine, longest_tokens, _FINE)
    reached = cover(shapes)
    worst = np.argsort(reached)[:_SEARCHED]
    shapes, reached = shapes[worst], reached[worst]
    reach = _FIRST_REACH
    for _ in range(_SEARCH_ROUNDS):
        around = (shapes[:, None, :] * reach**_NEIGHBOURS).reshape(-1, _KINDS)
        tried = cover(around).reshape(len(shapes), -1)
        best = tried.argmin(axis=1)
        shapes = around.reshape(len(shapes), -1, _KINDS)[np.arange(len(shapes)), best]
        reached = tried.min(axis=1)
        reach = max(reach**0.7, 1.0 + 1e-4)
    return float(reached.min())


def _grid(engine: StepEngine, longest_tokens: float, points: tuple[int, int, int, int]) -> FloatArray:
    """(s, 4) shapes: prompt tokens, what each of them attends to, sequences, context of each."""
    prompt = _axis(engine.step_tokens, points[0])
    sees = _axis(longest_tokens, points[1])
    seqs = np.unique(np.rint(_axis(engine.max_seqs, points[2])))
    context = _axis(longest_tokens, points[3])[1:]
    x, r, n, c = (axis.ravel() for axis in np.meshgrid(prompt, sees, seqs, context, indexing="ij"))
    once = (x + n > 0.0) & ((x > 0.0) | (r == 0.0)) & ((n > 0.0) | (c == context[0]))
    return np.asarray(np.stack([x, r, n, c], axis=1)[once])


def _content(engine: StepEngine, longest_tokens: float, shapes: FloatArray) -> FloatArray:
    """(s, 4) what steps of these shapes compute, cut to what the engine holds and requests ask."""
    n = np.minimum(shapes[:, 2], engine.max_seqs)
    x = np.minimum(shapes[:, 0], np.maximum(engine.step_tokens - n, 0.0))
    sees, context = (np.minimum(shapes[:, axis], longest_tokens) for axis in (1, 3))
    return np.stack([x, x * sees, n, np.minimum(n * context, engine.kv_tokens)], axis=1)


def _axis(most: float, points: int) -> FloatArray:
    """0, and a geometric axis from 1 to ``most``."""
    return np.concatenate([[0.0], np.geomspace(1.0, max(most, 1.0), points)])


def _prices(content: FloatArray, energy_j: FloatArray, amounts: FloatArray) -> FloatArray:
    """Duals of the program over these steps: steps join it while they are underpriced."""
    worth = content / amounts  # share of the work that a step does
    best = [int(np.argmax(worth[:, k] / energy_j)) for k in range(len(amounts))]
    chosen = np.unique(np.array(best))
    for _ in range(_ROUNDS):
        result = linprog(energy_j[chosen], A_ub=-worth[chosen].T, b_ub=-np.ones(len(amounts)), method="highs")
        duals = -np.asarray(result.ineqlin.marginals)
        short = (energy_j - worth @ duals) / energy_j
        if short.min() > -_TIGHT:
            break
        entering = np.argpartition(short, _ENTERING)[:_ENTERING] if len(short) > _ENTERING else np.arange(len(short))
        chosen = np.unique(np.concatenate([chosen, entering]))
    return np.asarray(duals / amounts)

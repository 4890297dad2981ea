"""Foresight: what the gateway believes of output lengths in virtual time, where the real ones are known.

``LearnedLengthsForesight`` runs the product's own predictor: it is asked before, and taught when an answer would have
ended, so it begins cold and never looks ahead. ``TrueLengths`` knows, or is wrong as often as it is told to be: for
comparison, and for the price of errors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pools.classes import ClassCuts
from pools.learned_lengths import LearnedLengths, LengthLimits
from pools.length_costs import LengthCosts
from pools.length_marks import coarse
from pools.lengths import LengthFeatures
from simulator.workload.arrivals import Arrivals, FloatColumn

Foretell = Callable[[Arrivals], tuple[Any, Any]]
"""Requests, in order of arrival -> predicted output size (0..2) and output tokens of each."""

ASKED_EVERY_S = 60.0
"""Predictions are renewed this often: between, what ends teaches nothing yet, so it is later than in the gateway."""
TAUGHT = 256  # answers the predictor is shown each time, evenly chosen
FIRST_TOKEN_S = 1.0  # an answer is taken to end this long after it came, and
TOKEN_S = 0.05  # this for each of its tokens


class Foresight(Protocol):
    """A kind of prediction; a value that a setup can hold."""

    def begin(self, cuts: ClassCuts, rng: np.random.Generator) -> Foretell:
        """Start anew for one run."""


@dataclass(frozen=True, slots=True)
class TrueLengths:
    """Names the output size, right with probability ``accuracy``, else a neighbouring one; and the size's mean tokens.

    The means are those of the Azure 2023 Conversation trace.
    """

    accuracy: float = 1.0
    mean_tokens: tuple[float, float, float] = (46.0, 204.0, 424.0)

    def begin(self, cuts: ClassCuts, rng: np.random.Generator) -> Foretell:
        """Keeps nothing but the source of its errors."""

        def foretell(requests: Arrivals) -> tuple[Any, Any]:
            size = np.searchsorted(np.asarray(cuts.output_tokens), requests.output_tokens, side="right")
            if self.accuracy < 1.0:
                wrong = rng.random(len(size)) >= self.accuracy
                up = rng.random(len(size)) < 0.5
                neighbour = np.where(size == 0, 1, np.where(size == 2, 1, np.where(up, 2, 0)))
                size = np.where(wrong, neighbour, size)
            return size, np.asarray(self.mean_tokens)[size]

        return foretell


@dataclass(frozen=True, slots=True)
class LearnedLengthsForesight:
    """The product's predictor, from cold. A trace tells it the input's length alone: no text, no tenant, no hint."""

    costs: LengthCosts = field(default_factory=LengthCosts)

    def begin(self, cuts: ClassCuts, rng: np.random.Generator) -> Foretell:
        """A predictor that knows nothing yet."""
        limits = LengthLimits(cuts=cuts, costs={_MODEL: self.costs})
        return _Learner(LearnedLengths(limits), cuts).foretell


_MODEL = "model"


class _Learner:
    """Asks and teaches in turns."""

    def __init__(self, predictor: LearnedLengths, cuts: ClassCuts) -> None:
        self._predictor = predictor
        self._cuts = np.asarray(cuts.output_tokens)
        self._asked_s = float("-inf")
        self._known: dict[int, float] = {}
        self._ends_s: FloatColumn = np.zeros(0)
        self._inputs: NDArray[np.int64] = np.zeros(0, np.int64)
        self._outputs: NDArray[np.int64] = np.zeros(0, np.int64)

    def foretell(self, requests: Arrivals) -> tuple[Any, Any]:
        inputs = _coarse(requests.input_tokens)
        tokens = np.empty(len(requests))
        begin = 0
        while begin < len(requests):
            now_s = float(requests.arrival_s[begin])
            if now_s >= self._asked_s + ASKED_EVERY_S:
                self._teach(now_s)
            end = max(int(np.searchsorted(requests.arrival_s, self._asked_s + ASKED_EVERY_S)), begin + 1)
            rows = slice(begin, end)
            tokens[rows] = self._ask(inputs[rows])
            self._await(requests.at(rows), inputs[rows])
            begin = end
        return np.searchsorted(self._cuts, tokens, side="right"), tokens

    def _ask(self, inputs: Any) -> Any:
        distinct, which = np.unique(inputs, return_inverse=True)
        for value in distinct.tolist():
            if value not in self._known:
                self._known[value] = self._predictor.predict(LengthFeatures(_MODEL, value)).tokens
        return np.array([self._known[value] for value in distinct.tolist()])[which]

    def _await(self, requests: Arrivals, inputs: Any) -> None:
        ends_s = requests.arrival_s + FIRST_TOKEN_S + TOKEN_S * requests.output_tokens
        self._ends_s = np.concatenate((self._ends_s, ends_s))
        self._inputs = np.concatenate((self._inputs, inputs))
        self._outputs = np.concatenate((self._outputs, requests.output_tokens.astype(np.int64)))

    def _teach(self, now_s: float) -> None:
        """What has ended by now, in order of its end."""
        self._asked_s = now_s
        self._known = {}
        ended = self._ends_s <= now_s
        order = np.flatnonzero(ended)[np.argsort(self._ends_s[ended], kind="stable")]
        if len(order) > TAUGHT:
            order = order[np.linspace(0, len(order) - 1, TAUGHT).astype(np.int64)]
        for tokens, answered in zip(self._inputs[order].tolist(), self._outputs[order].tolist(), strict=True):
            self._predictor.learn(LengthFeatures(_MODEL, tokens), answered)
        left = ~ended
        self._ends_s, self._inputs, self._outputs = self._ends_s[left], self._inputs[left], self._outputs[left]


def _coarse(input_tokens: Any) -> Any:
    """As ``pools.length_marks.coarse``, of many."""
    distinct, which = np.unique(input_tokens, return_inverse=True)
    return np.array([coarse(int(value)) for value in distinct], dtype=np.int64)[which]

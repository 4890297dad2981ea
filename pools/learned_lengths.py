"""LearnedLengths: foretells output lengths from what a request looks like, and learns from every answer that ends.

What the client says comes first: a hint is believed, a cap is never exceeded. Else, per model, three steps:

1. an expectation in octaves: the sum of the weights of the request's marks (size, form, tenant, system prompt, words),
   learned online by adaptive gradient steps of bounded size;
2. a distribution: how far answers of about this expectation were from it (``pools.length_residuals``);
3. the output size that costs least in expectation (``pools.length_costs``).

The ends of the interval it states are kept honest: after each answer they move a little, outwards where it lay beyond
them (conformal quantile tracking, Angelopoulos, Candes and Tibshirani 2023). Errors are taken of what was promised
before, not of what would be said now, so the delay of answers spoils nothing. Cold, it expects what the class cuts say:
they are the 33rd and 66th percentile of a public trace (DynamoLLM section III). Pure; bounded memory; a tenant weighs
at most what ``TenantShares`` grants in what others read.
"""

import math
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp2
from statistics import NormalDist
from typing import Any

import msgspec

from pools.classes import ClassCuts
from pools.length_costs import LengthCosts
from pools.length_marks import TABLE, Marks, marks_of
from pools.length_residuals import CELLS, LOWEST, PER_OCTAVE, Residuals, prior_of
from pools.lengths import LengthFeatures, PredictedLength
from pools.tenant_shares import HALF_LIFE, TenantShares

_LARGEST_STEP = 1.5  # octaves of error that count; what is farther off is not believed to say more
_TAIL = 0.1  # share of answers below the low and above the high quantile
_MOST_MOVED = 6.0  # octaves an end of the interval is moved at most
_FARTHEST = 18.0  # octaves: 262,143 tokens
_PROOFS = 50.0  # squared octaves said beforehand that a part's first credit counts for
_FORMAT = 2
_GROWTH = 2.0 ** (1.0 / HALF_LIFE)
_ALL, _FINE = -1, 32


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """What no prediction goes beyond, and how fast is learned."""

    cuts: ClassCuts = field(default_factory=ClassCuts)
    costs: Mapping[str, LengthCosts] = field(default_factory=dict)  # by model; others: every size off costs the same
    context_tokens: Mapping[str, int] = field(default_factory=dict)  # by model: prompt and answer together
    longest_tokens: int = 131_072  # where no context is known
    form_step: float = 0.3  # octaves a weight moves at first
    word_step: float = 0.07  # there are many words, and each says little
    end_step: float = 0.03  # octaves an end of the interval moves for each answer beyond it
    models: int = 64  # remembered; the longest unseen is forgotten
    promises: int = 4096  # requests on their way that are remembered


class _Credit:
    """How far a part of the expectation is believed: the slope of what came on what it said beforehand, 0..1."""

    __slots__ = ("agreed", "said", "share")

    def __init__(self) -> None:
        self.stand(0.0, 0.0)

    def stand(self, said: float, agreed: float) -> None:
        self.said, self.agreed = said, agreed
        self.share = min(max((agreed + 0.5 * _PROOFS) / (said + _PROOFS), 0.0), 1.0)

    def judge(self, said: float, missing: float, weight: float) -> None:
        self.stand(self.said / _GROWTH + weight * said * said, self.agreed / _GROWTH + weight * said * missing)


class _Model:
    """What was learned of one model's answers."""

    __slots__ = ("answers", "bins", "expected", "form", "high", "low", "read", "text")

    def __init__(self, expected: float) -> None:
        self.expected = expected  # octaves, of an answer of which nothing is known
        self.answers = 0.0
        self.low = self.high = 0.0  # octaves that the ends of the interval are moved by
        self.form, self.text = _Credit(), _Credit()
        self.bins: dict[int, Residuals] = {}  # _ALL; octaves; from _FINE on: quarters of them
        self.read: dict[int, _Reading] = {}  # what they say of a quarter, since the last answer was learned

    def bin(self, number: int) -> Residuals:
        known = self.bins.get(number)
        if known is None:
            known = self.bins[number] = Residuals()
        return known


class _Reading(msgspec.Struct, frozen=True, gc=False):
    """The distribution of answers of about one expectation, and three of its quantiles, in octaves off it."""

    residuals: Residuals
    low: float
    median: float
    high: float


class _Promise(msgspec.Struct, frozen=True, gc=False):
    """What was said of a request before it began, in octaves."""

    marks: Marks
    base: float
    form: float
    text: float
    octaves: float
    low: float
    high: float


class LearnedLengths:
    """A ``LengthPredictor``."""

    def __init__(self, limits: LengthLimits | None = None) -> None:
        self.limits = limits or LengthLimits()
        low, high = (math.log2(tokens + 1.0) for tokens in self.limits.cuts.output_tokens)
        self._cold = (low + high) / 2.0
        self._cuts = (low, high)
        first, second = map(float, self.limits.cuts.output_tokens)
        below = math.nextafter  # an output size ends before the next begins
        self._sizes = ((0.0, below(first, 0.0)), (first, below(second, 0.0)), (second, math.inf))
        self._prior = prior_of((high - low) / (2.0 * NormalDist().inv_cdf(2.0 / 3.0)))
        self._weights = array("f", bytes(4 * TABLE))
        self._squares = array("f", [1.0]) * TABLE
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._nothing = _Model(self._cold)  # of a model of which nothing was learned
        self._tenants = TenantShares()
        self._promised: OrderedDict[LengthFeatures, _Promise] = OrderedDict()
        self._even = LengthCosts()
        self._untaught = _Model(self._cold)

    def predict(self, features: LengthFeatures) -> PredictedLength:
        """The hint if there is one, else what was learned from requests like it; never over cap or limit."""
        most, hint = self._most(features), features.hint_tokens
        if hint is not None and hint >= 0:
            tokens = min(float(hint), most)
            return PredictedLength(tokens, tokens, tokens, tokens)
        promise, reading = self._foretell(features)
        median = min(_tokens(promise.octaves + reading.median), most)
        return PredictedLength(
            self._planned(features, promise.octaves, reading, most),
            min(_tokens(promise.low), median),
            median,
            max(min(_tokens(promise.high), most), median),
        )

    def plan(self, features: LengthFeatures) -> float:
        """The tokens of ``predict``."""
        most, hint = self._most(features), features.hint_tokens
        if hint is not None and hint >= 0:
            return min(float(hint), most)
        promise, reading = self._foretell(features)
        return self._planned(features, promise.octaves, reading, most)

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Compare what was promised with what came. An answer that was hinted at teaches nothing."""
        if features.hint_tokens is not None and features.hint_tokens >= 0:
            return
        weight = self._tenants.weigh(features.tenant)
        model = self._known(features.model)
        promise = self._promised.get(features) or self._promise(model, features)[0]
        came = math.log2(min(max(output_tokens, 0), self.limits.longest_tokens) + 1.0)
        self._follow_ends(model, promise, came, weight)
        for number in _bins_of(promise.octaves):
            model.bin(number).add(came - promise.octaves, weight, _GROWTH)
        model.read.clear()
        model.form.judge(promise.form, came - promise.base, weight)
        model.text.judge(promise.text, came - promise.base - promise.form, weight)
        self._step(model, promise.marks, came, weight)

    # --- what is expected ----------------------------------------------------------------------------------------

    def _most(self, features: LengthFeatures) -> float:
        limits, cap = self.limits, features.cap_tokens
        most = limits.longest_tokens
        context = limits.context_tokens.get(features.model)
        if context is not None and context - features.input_tokens < most:
            most = context - features.input_tokens
        if cap is not None and cap < most:
            most = cap
        return float(most) if most > 0 else 0.0

    def _foretell(self, features: LengthFeatures) -> tuple[_Promise, _Reading]:
        """What to expect of a request; remembered, to learn from how it turns out."""
        told = self._promise(self._models.get(features.model) or self._untaught, features)
        promised = self._promised
        promised[features] = told[0]
        if len(promised) > self.limits.promises:
            promised.popitem(last=False)
        return told

    def _promise(self, model: _Model, features: LengthFeatures) -> tuple[_Promise, _Reading]:
        own, shared, words = marks = marks_of(features)
        weight = self._weights.__getitem__
        form = sum(map(weight, own)) + sum(map(weight, shared))
        text = sum(map(weight, words))
        octaves = model.expected + model.form.share * form + model.text.share * text
        if octaves < 0.0:
            octaves = 0.0
        elif octaves > _FARTHEST:
            octaves = _FARTHEST
        reading = model.read.get(int(4.0 * octaves)) or self._read(model, octaves)
        low, high = octaves + reading.low + model.low, octaves + reading.high + model.high
        return _Promise(marks, model.expected, form, text, octaves, low, high), reading

    def _sum(self, marks: list[int]) -> float:
        return sum(map(self._weights.__getitem__, marks))

    def _read(self, model: _Model, octaves: float) -> _Reading:
        """Of the narrowest bin that has seen something, leaning on the wider ones."""
        shares = self._prior
        residuals = model.bin(_ALL)
        for number in _bins_of(octaves):
            known = model.bins.get(number)
            if known is not None:
                shares = known.refresh(shares)
                residuals = known
        quantiles = map(residuals.quantile, (_TAIL, 0.5, 1.0 - _TAIL))
        reading = model.read[int(4.0 * octaves)] = _Reading(residuals, *quantiles)
        return reading

    def _planned(self, features: LengthFeatures, octaves: float, reading: _Reading, most: float) -> float:
        """The median, moved into the output size that costs least."""
        limits, below = self.limits, reading.residuals.below
        first, second = self._cuts
        short, not_long = below(first - octaves), below(second - octaves)
        if not_long < short:
            not_long = short
        input_size = bisect_right(limits.cuts.input_tokens, features.input_tokens)
        costs = limits.costs.get(features.model, self._even)
        size = costs.cheapest(input_size, (short, not_long - short, 1.0 - not_long))
        tokens = exp2(octaves + reading.median) - 1.0
        least, largest = self._sizes[size]
        if tokens > most:  # what it takes at most is the median then, too
            tokens = most
        if tokens < least:
            tokens = least
        elif tokens > largest:
            tokens = largest
        return tokens if tokens < most else most

    # --- what is learned -----------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = _Model(self._cold)
            if len(self._models) > self.limits.models:
                self._models.popitem(last=False)
        else:
            self._models.move_to_end(name)
        return model

    def _follow_ends(self, model: _Model, promise: _Promise, came: float, weight: float) -> None:
        """An end moves outwards where the answer lay beyond it, and a ninth as far inwards where it did not."""
        step = self.limits.end_step * weight
        model.low = _within(model.low + step * (_TAIL - (came < promise.low)), _MOST_MOVED)
        model.high = _within(model.high - step * (_TAIL - (came > promise.high)), _MOST_MOVED)

    def _step(self, model: _Model, marks: Marks, came: float, weight: float) -> None:
        """Move base, form and text, each towards what those before it leave."""
        limits = self.limits
        model.answers += weight
        left = came - model.expected
        model.expected += weight * _within(left, _LARGEST_STEP) / (10.0 + model.answers**0.75)
        left -= self._sum(marks.own) + self._sum(marks.shared)
        self._move(marks.own, limits.form_step, _within(left, _LARGEST_STEP))
        self._move(marks.shared, limits.form_step, weight * _within(left, _LARGEST_STEP))
        if marks.words:
            left -= self._sum(marks.words)
            self._move(marks.words, limits.word_step, weight * _within(left, _LARGEST_STEP))

    def _move(self, marks: list[int], step: float, gradient: float) -> None:
        weights, squares, more = self._weights, self._squares, gradient * gradient
        for mark in marks:
            square = squares[mark] + more
            squares[mark] = square
            weights[mark] += step * gradient / math.sqrt(square)

    # --- over a restart ------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All it has learned, as plain lists, numbers and text."""
        models = [
            [
                name,
                [model.expected, model.answers, model.low, model.high],
                [[credit.said, credit.agreed] for credit in (model.form, model.text)],
                [[number, seen.count, [w / seen.gain for w in seen.weights]] for number, seen in model.bins.items()],
            ]
            for name, model in self._models.items()
        ]
        return {
            "version": _FORMAT,
            "shape": [TABLE, CELLS, LOWEST, PER_OCTAVE],
            "weights": b64encode(self._weights.tobytes()).decode(),
            "squares": b64encode(self._squares.tobytes()).decode(),
            "models": models,
            "tenants": self._tenants.snapshot(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot instead of what is known. Raises ``ValueError`` if it is not one of this shape."""
        if (snapshot.get("version"), snapshot.get("shape")) != (_FORMAT, [TABLE, CELLS, LOWEST, PER_OCTAVE]):
            raise ValueError("length snapshot: another version or shape; delete it to start anew")
        weights, squares = _table(snapshot["weights"], -math.inf), _table(snapshot["squares"], 1.0)
        models: OrderedDict[str, _Model] = OrderedDict()
        for name, numbers, credits, bins in snapshot["models"][-self.limits.models :]:
            model = models[str(name)] = _Model(_finite(numbers[0]))
            model.answers = max(_finite(numbers[1]), 0.0)
            model.low, model.high = (_within(_finite(number), _MOST_MOVED) for number in numbers[2:4])
            for credit, (said, agreed) in zip((model.form, model.text), credits, strict=True):
                credit.stand(max(_finite(said), 0.0), _finite(agreed))
            for number, count, seen in bins:
                if len(seen) != CELLS or not all(math.isfinite(w) and w >= 0.0 for w in seen):
                    raise ValueError(f"length snapshot: {name} has no {CELLS} finite weights; delete the snapshot")
                model.bins[int(number)] = Residuals([float(w) for w in seen], int(count))
        tenants = TenantShares()
        tenants.restore(snapshot["tenants"])
        self._weights, self._squares, self._models, self._tenants = weights, squares, models, tenants


def _within(value: float, most: float) -> float:
    return min(max(value, -most), most)


def _bins_of(octaves: float) -> tuple[int, int, int]:
    """From the widest to the narrowest."""
    return _ALL, int(octaves), _FINE + int(4.0 * octaves)


def _tokens(octaves: float) -> float:
    return max(exp2(octaves) - 1.0, 0.0)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("length snapshot: a number is not finite; delete the snapshot")
    return number


def _table(text: str, least: float) -> "array[float]":
    content = b64decode(text, validate=True)
    table = array("f", content if len(content) == 4 * TABLE else b"")
    if len(table) != TABLE or not all(math.isfinite(w) and w >= least for w in table):
        raise ValueError(f"length snapshot: no table of {TABLE} finite weights; delete the snapshot")
    return table

"""Output-length predictors against each other, in time order: each is asked before, and taught when the answer ended.

An answer ends ``FIRST_S`` after its request came and ``TOKEN_S`` for each token: predictions made meanwhile do not know
it. The first ``UNSCORED`` requests teach and do not count. ``contest`` gives one row a predictor.
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from pools.classes import ClassCuts
from pools.learned_lengths import LearnedLengths, LengthLimits
from pools.length_costs import LengthCosts
from pools.length_marks import marks_of
from pools.lengths import LengthFeatures

FIRST_S = 1.0
TOKEN_S = 0.03
UNSCORED = 400
CUTS = ClassCuts()


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and what came of it."""

    arrival_s: float
    features: LengthFeatures
    output_tokens: int


class Contestant(Protocol):
    """What is compared."""

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """Tokens to plan with, and the low, middle and high quantile; nan where it states none."""

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Take in an answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one did. ``p50_us`` and ``p99_us`` are of a clock on the wall, whatever else the machine was doing.

    ``cpu_p50_us`` and ``cpu_p99_us`` count the time of the asking thread alone; reading that clock is in them.
    """

    name: str
    accuracy: float  # of the three output sizes
    balanced: float  # mean over the sizes of the share named rightly
    error_tokens: float  # mean absolute, of the middle
    factor: float  # exp of the mean absolute error of the logarithm
    covered: float  # share inside the stated 80 % interval
    width: float  # its ends' ratio, geometric mean
    loss_j: float  # mean cost of the size named, in joules by the profile
    p50_us: float
    p99_us: float
    cpu_p50_us: float
    cpu_p99_us: float


def contest(samples: Sequence[Sample], makers: dict[str, Callable[[], Contestant]], costs: LengthCosts) -> list[Row]:
    """Run all over the same samples."""
    return [_run(name, make(), samples, costs) for name, make in makers.items()]


def _run(name: str, contestant: Contestant, samples: Sequence[Sample], costs: LengthCosts) -> Row:
    said, took_s, took_cpu_ns = [], [], []
    under_way: list[tuple[float, int]] = []
    for index, sample in enumerate(samples):
        while under_way and under_way[0][0] <= sample.arrival_s:
            ended = samples[heapq.heappop(under_way)[1]]
            contestant.learn(ended.features, ended.output_tokens)
        begun_s, begun_cpu_ns = time.perf_counter(), time.thread_time_ns()
        said.append(contestant.predict(sample.features))
        took_cpu_ns.append(time.thread_time_ns() - begun_cpu_ns)
        took_s.append(time.perf_counter() - begun_s)
        heapq.heappush(under_way, (sample.arrival_s + FIRST_S + TOKEN_S * sample.output_tokens, index))
    scored = samples[UNSCORED:]
    planned, low, middle, high = np.array(said[UNSCORED:], dtype=np.float64).T
    true = np.array([s.output_tokens for s in scored], dtype=np.float64)
    size, named = _sizes(true), _sizes(planned)
    input_size = np.searchsorted(CUTS.input_tokens, [s.features.input_tokens for s in scored], side="right")
    joules = np.array(costs.joules)
    return Row(
        name,
        float((size == named).mean()),
        float(np.mean([(named[size == k] == k).mean() for k in np.unique(size)])),
        float(np.abs(middle - true).mean()),
        float(np.exp(np.abs(np.log((middle + 1) / (true + 1))).mean())),
        float(((low <= true) & (true <= high)).mean()) if np.isfinite(low).all() else math.nan,
        float(np.exp(np.log((high + 1) / (low + 1)).mean())),
        float(joules[input_size, named, size].mean()),
        1e6 * float(np.quantile(took_s[UNSCORED:], 0.5)),
        1e6 * float(np.quantile(took_s[UNSCORED:], 0.99)),
        1e-3 * float(np.quantile(took_cpu_ns[UNSCORED:], 0.5)),
        1e-3 * float(np.quantile(took_cpu_ns[UNSCORED:], 0.99)),
    )


def _sizes(tokens: Any) -> Any:
    return np.searchsorted(np.asarray(CUTS.output_tokens), tokens, side="right")


def as_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For a file."""
    return [asdict(row) for row in rows]


class Product:
    """``pools.learned_lengths``; without ``words`` it is not shown the text."""

    def __init__(self, costs: LengthCosts, words: bool = True) -> None:
        self._predictor = LearnedLengths(LengthLimits(costs={"m": costs}))
        self._words = words

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """As the gateway does."""
        return self._predictor.predict(features if self._words else features._replace(turn=b""))

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """As the gateway does."""
        self._predictor.learn(features if self._words else features._replace(turn=b""), output_tokens)


class Constant:
    """The same for all: quantiles of every answer so far, or their mean (that of the only tenant), or the cap."""

    def __init__(self, kind: str, cap_tokens: float = 1024.0) -> None:
        self._kind, self._cap_tokens = kind, cap_tokens
        self._seen: list[int] = []
        self._said = (cap_tokens, math.nan, cap_tokens, math.nan)

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """Whatever the request."""
        return self._said

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Remember it."""
        self._seen.append(output_tokens)
        if self._kind == "mean":
            mean = float(np.mean(self._seen))
            self._said = (mean, math.nan, mean, math.nan)
        elif self._kind == "median" and len(self._seen) % 16 == 0:
            low, middle, high = np.quantile(self._seen, (0.1, 0.5, 0.9))
            self._said = (float(middle), float(low), float(middle), float(high))


class Confused:
    """Knows the answer, and errs as a published BERT proxy does: draws from what it said of answers of that size."""

    def __init__(self, said_of: dict[int, Any], truth: dict[LengthFeatures, int], seed: int = 0) -> None:
        """``said_of``: predicted tokens of answers of each true size."""
        self._said_of, self._truth = said_of, truth
        self._random = np.random.default_rng(seed)

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """One of its words, at random."""
        words = self._said_of[int(_sizes(self._truth[features]))]
        tokens = float(words[self._random.integers(len(words))])
        return tokens, math.nan, tokens, math.nan

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Its training is over."""


class SgdWords:
    """scikit-learn's SGDRegressor on the product's marks, huber loss, one step an answer."""

    def __init__(self) -> None:
        from sklearn.linear_model import SGDRegressor

        self._model = SGDRegressor(loss="huber", epsilon=1.0, alpha=1e-4, learning_rate="adaptive", eta0=0.02)
        self._known = False

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """The middle only."""
        octaves = float(self._model.predict(_sparse(features))[0]) if self._known else 5.0
        tokens = 2.0 ** min(max(octaves, 0.0), 14.0)
        return tokens, math.nan, tokens, math.nan

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """One step."""
        self._model.partial_fit(_sparse(features), [math.log2(output_tokens + 1)])
        self._known = True


def _sparse(features: LengthFeatures) -> Any:
    from scipy.sparse import csr_matrix

    marks = sorted({mark % 4096 for group in marks_of(features) for mark in group})
    return csr_matrix((np.ones(len(marks)), ([0] * len(marks), marks)), shape=(1, 4096))


class RiverLinear:
    """river's linear regression on the product's marks, with Adam and the absolute loss."""

    def __init__(self) -> None:
        from river import linear_model, optim

        self._model = linear_model.LinearRegression(
            optimizer=optim.Adam(0.05), loss=optim.losses.Quantile(0.5), intercept_init=5.0, intercept_lr=0.02
        )

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """The middle only."""
        octaves = self._model.predict_one(_dict(features))
        tokens = 2.0 ** min(max(octaves, 0.0), 14.0)
        return tokens, math.nan, tokens, math.nan

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """One step."""
        self._model.learn_one(_dict(features), math.log2(output_tokens + 1))


def _dict(features: LengthFeatures) -> dict[int, float]:
    return {mark: 1.0 for group in marks_of(features) for mark in group}


class Boosted:
    """LightGBM quantile trees on sizes, counts and 32 hashed words, fitted anew every 400 answers of the last 4,000."""

    def __init__(self) -> None:
        import lightgbm

        self._make = lightgbm.LGBMRegressor
        self._models: list[Any] = []
        self._rows: list[list[float]] = []
        self._true: list[float] = []

    def predict(self, features: LengthFeatures) -> tuple[float, float, float, float]:
        """Three models asked one after the other."""
        if not self._models:
            return 50.0, 5.0, 50.0, 500.0
        row = np.array([_dense(features)])
        low, middle, high = (2.0 ** float(model.predict(row, num_threads=1)[0]) for model in self._models)
        return middle, low, middle, high

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Remember it; fit when it is time to."""
        self._rows.append(_dense(features))
        self._true.append(math.log2(output_tokens + 1))
        if len(self._rows) % 400 == 0:
            x, y = np.array(self._rows[-4000:]), np.array(self._true[-4000:])
            settings = {"n_estimators": 80, "num_leaves": 15, "learning_rate": 0.07, "verbose": -1, "n_jobs": 1}
            self._models = [
                self._make(objective="quantile", alpha=share, **settings).fit(x, y).booster_
                for share in (0.1, 0.5, 0.9)
            ]


def _dense(features: LengthFeatures) -> list[float]:
    turn = features.turn
    counts = [0.0] * 32
    for mark in marks_of(features).words:
        counts[mark % 32] += 1.0
    return [features.input_tokens, len(turn), turn.count(b"\\n"), turn.count(b"?"), turn.count(b"`"), *counts]

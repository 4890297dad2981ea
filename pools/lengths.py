"""LengthPredictor: how long an answer will be, before its first token; and the first that learns it from those seen.

What the client says comes first: a hint is believed, a cap is never exceeded. Else a running distribution of lengths
for requests that look alike (model, size of input, tools, structured output, thinking), which leans on the less
specific ones while it has seen little, and at first on the class cuts themselves, which are the 33rd and 66th
percentile of a public trace (DynamoLLM section III). Pure; bounded memory; saved and restored as a plain dict.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

from pools.classes import ClassCuts


class LengthFeatures(NamedTuple):
    """What is known of an answer before it begins."""

    model: str
    input_tokens: int
    cap_tokens: int | None = None  # max_tokens, max_completion_tokens
    hint_tokens: int | None = None  # nvext.agent_hints.osl
    tools: bool = False
    structured: bool = False  # a response_format
    thinking: bool = False
    tenant: str = "default-flow"


class LengthPredictor(Protocol):
    """Predicts output tokens, and learns from answers that ended."""

    def predict(self, features: LengthFeatures) -> float:
        """Output tokens to plan with: finite, at least 0, at most the cap."""

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Take in an answer of ``output_tokens`` tokens that ended by itself or at its cap."""


PER_OCTAVE = 3
BUCKETS = 18 * PER_OCTAVE  # up to 262,143 tokens
LONGEST_TOKENS = 2.0**18 - 1.0


def bucket_of(tokens: float) -> int:
    """The bucket of a length; bucket k holds lengths + 1 from 2^(k/3) to 2^((k+1)/3)."""
    return min(int(PER_OCTAVE * math.log2(tokens + 1.0) + 1e-9), BUCKETS - 1)


def edge(bucket: float) -> float:
    """The length at which a bucket begins."""
    return math.exp2(bucket / PER_OCTAVE) - 1.0


def quantile(weights: list[float], share: float) -> float:
    """The length that ``share`` of the weight lies below; inside a bucket, interpolated on its logarithmic scale."""
    wanted = share * sum(weights)
    below = 0.0
    for bucket, weight in enumerate(weights):
        if weight > 0.0 and below + weight >= wanted:
            return edge(bucket + (wanted - below) / weight)
        below += weight
    return LONGEST_TOKENS


def prior_of(cuts: ClassCuts) -> list[float]:
    """The log-normal whose 33rd and 66th percentile are the cuts between short, medium and long outputs. Sums to 1."""
    low, high = (math.log(t + 1.0) for t in cuts.output_tokens)
    z = NormalDist().inv_cdf(2.0 / 3.0)
    normal = NormalDist((low + high) / 2.0, (high - low) / (2.0 * z))
    cumulative = [normal.cdf(math.log(2.0) * k / PER_OCTAVE) for k in range(BUCKETS + 1)]
    cumulative[0], cumulative[-1] = 0.0, 1.0
    return [b - a for a, b in pairwise(cumulative)]


@dataclass(frozen=True, slots=True)
class RunningLengthsLimits:
    """How the running estimate weighs what it has seen."""

    quantile: float = 0.5  # of the distribution; higher errs to the long side, which costs energy but no SLO
    lean: float = 10.0  # answers that weigh as much as all that the less specific distribution knows
    half_life: int = 2000  # answers after which one counts half
    max_keys: int = 4096  # kinds of request remembered; the longest unseen is forgotten
    longest_tokens: int = 131_072  # no answer is longer
    cuts: ClassCuts = field(default_factory=ClassCuts)


class _Seen:
    """Lengths seen of one kind of request."""

    __slots__ = ("answered_tokens", "count", "gain", "unread", "weights")

    def __init__(self, weights: list[float] | None = None) -> None:
        self.weights = weights if weights is not None else [0.0] * BUCKETS
        self.count = 0
        self.gain = 1.0  # weight of the next answer; grows instead of all others fading
        self.unread = 0  # answers since ``answered_tokens`` was worked out
        self.answered_tokens = -1.0

    def add(self, tokens: float, growth: float) -> None:
        self.weights[bucket_of(tokens)] += self.gain
        self.count += 1
        self.unread += 1
        self.gain *= growth
        if self.gain > 1e6:
            self.weights = [w / self.gain for w in self.weights]
            self.gain = 1.0

    def blended(self, under: list[float], lean: float) -> list[float]:
        """The distribution, sum 1, with ``lean`` answers' worth of the one under it."""
        scale = 1.0 / (sum(self.weights) / self.gain + lean)
        own = scale / self.gain
        lean *= scale
        return [own * w + lean * u for w, u in zip(self.weights, under, strict=True)]


_Key = tuple[Any, ...]


class RunningLengths:
    """The first ``LengthPredictor``: hints, caps, and a running distribution."""

    def __init__(self, limits: RunningLengthsLimits | None = None) -> None:
        self.limits = limits or RunningLengthsLimits()
        self._growth = 2.0 ** (1.0 / self.limits.half_life)
        self._prior = prior_of(self.limits.cuts)
        self._prior_tokens = quantile(self._prior, self.limits.quantile)
        self._seen: OrderedDict[_Key, _Seen] = OrderedDict()

    def predict(self, features: LengthFeatures) -> float:
        """The hint if there is one, else the quantile of requests like it; never over cap or limit."""
        most = float(self.limits.longest_tokens)
        cap = features.cap_tokens
        if cap is not None and cap < most:
            most = float(max(cap, 0))
        if features.hint_tokens is not None and features.hint_tokens >= 0:
            return min(float(features.hint_tokens), most)
        return min(self._expected(features), most)

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Count an answer for its kind, for those of its input size, and for its model."""
        tokens = min(max(output_tokens, 0), self.limits.longest_tokens)
        for key in _keys(features):
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = _Seen()
                if len(self._seen) > self.limits.max_keys:
                    self._seen.popitem(last=False)
            else:
                self._seen.move_to_end(key)
            seen.add(tokens, self._growth)

    def _expected(self, features: LengthFeatures) -> float:
        keys = _keys(features)
        seen = self._seen.get(keys[-1])
        if seen is not None and seen.answered_tokens >= 0.0 and seen.unread * 16 <= seen.count:
            return seen.answered_tokens
        under = self._prior
        for key in keys:
            known = self._seen.get(key)
            if known is not None:
                under = known.blended(under, self.limits.lean)
        if under is self._prior:
            return self._prior_tokens
        tokens = quantile(under, self.limits.quantile)
        if seen is not None:
            seen.answered_tokens, seen.unread = tokens, 0
        return tokens

    def snapshot(self) -> dict[str, Any]:
        """All it has learned, as plain lists and numbers."""
        kinds = [[list(key), seen.count, [w / seen.gain for w in seen.weights]] for key, seen in self._seen.items()]
        return {"version": 1, "buckets": BUCKETS, "per_octave": PER_OCTAVE, "kinds": kinds}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot instead of what is known. Raises ``ValueError`` if it is not one of these buckets."""
        if (snapshot.get("version"), snapshot.get("buckets"), snapshot.get("per_octave")) != (1, BUCKETS, PER_OCTAVE):
            raise ValueError("length snapshot: another version or other buckets; delete it to start anew")
        restored: OrderedDict[_Key, _Seen] = OrderedDict()
        for key, count, weights in snapshot["kinds"][-self.limits.max_keys :]:
            if len(weights) != BUCKETS or not all(math.isfinite(w) and w >= 0.0 for w in weights):
                raise ValueError(f"length snapshot: kind {key} has no {BUCKETS} finite weights; delete the snapshot")
            seen = restored[tuple(key)] = _Seen([float(w) for w in weights])
            seen.count = int(count)
        self._seen = restored


def _keys(features: LengthFeatures) -> tuple[_Key, _Key, _Key]:
    """The kinds a request belongs to, from the least to the most specific."""
    size = max(features.input_tokens, 0).bit_length()
    kind = (features.model, size, features.tools, features.structured, features.thinking)
    return (features.model,), (features.model, size), kind

"""Distributions of input and output lengths, sampled from a given generator. Pure."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.workload.arrivals import TokenColumn, WorkloadError


class TokenDistribution(Protocol):
    """How many tokens one side of a request has."""

    def sample(self, rng: np.random.Generator, count: int) -> TokenColumn:
        """``count`` draws, each >= 1."""


class LengthDistribution(Protocol):
    """How many input and output tokens a request has, jointly."""

    def sample(self, rng: np.random.Generator, count: int) -> tuple[TokenColumn, TokenColumn]:
        """``count`` draws of (input tokens, output tokens)."""


@dataclass(frozen=True, slots=True)
class TokenHistogram:
    """Token counts with their probabilities; made by ``of``."""

    tokens: TokenColumn  # shape (k,), >= 1
    cumulative: NDArray[np.float64]  # shape (k,), ends at 1

    @staticmethod
    def of(tokens: NDArray[np.float64], weights: NDArray[np.float64]) -> "TokenHistogram":
        """A histogram of these token counts with weights in any unit. Raises WorkloadError if they are none."""
        total = weights.sum()
        if len(tokens) == 0 or not total > 0 or weights.min() < 0:
            raise WorkloadError("a length histogram needs token counts with weights above 0")
        return TokenHistogram(np.maximum(tokens, 1).astype(np.int32), np.cumsum(weights) / total)

    def sample(self, rng: np.random.Generator, count: int) -> TokenColumn:
        """``count`` independent draws."""
        at = np.searchsorted(self.cumulative, rng.random(count), side="right")
        return self.tokens[np.minimum(at, len(self.tokens) - 1)]


@dataclass(frozen=True, slots=True)
class TokenCurve:
    """A cumulative distribution given by points, straight between them (in tokens)."""

    tokens: NDArray[np.float64]  # shape (k,), rising
    cumulative: NDArray[np.float64]  # shape (k,), never falling, ends at 1

    def sample(self, rng: np.random.Generator, count: int) -> TokenColumn:
        """``count`` independent draws, rounded to whole tokens; below the first point, the first point."""
        drawn = np.interp(rng.random(count), self.cumulative, self.tokens)
        return np.maximum(np.rint(drawn), 1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class IndependentLengths:
    """Input and output drawn apart: all that a source with marginals only can give."""

    input: TokenDistribution
    output: TokenDistribution

    def sample(self, rng: np.random.Generator, count: int) -> tuple[TokenColumn, TokenColumn]:
        """``count`` draws of (input tokens, output tokens)."""
        return self.input.sample(rng, count), self.output.sample(rng, count)


@dataclass(frozen=True, slots=True)
class RecordedLengths:
    """Pairs seen in a trace, drawn with replacement: keeps how input and output go together."""

    input_tokens: TokenColumn
    output_tokens: TokenColumn

    def __post_init__(self) -> None:
        if len(self.input_tokens) == 0 or len(self.input_tokens) != len(self.output_tokens):
            raise WorkloadError("recorded lengths need at least one pair, and as many inputs as outputs")

    def sample(self, rng: np.random.Generator, count: int) -> tuple[TokenColumn, TokenColumn]:
        """``count`` draws of (input tokens, output tokens)."""
        at = rng.integers(len(self.input_tokens), size=count)
        return self.input_tokens[at], self.output_tokens[at]


@dataclass(frozen=True, slots=True)
class ClassLengths:
    """A mix of request classes; inside a class, input and output are drawn apart between quantiles.

    ``shares`` has shape (k,); ``input_quantiles`` and ``output_quantiles`` have shape (k, q): token counts at the
    rising ``probabilities`` from 0 to 1, shape (q,), log-linear between them (lengths are spread over decades).
    """

    shares: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    input_quantiles: NDArray[np.float64]
    output_quantiles: NDArray[np.float64]

    def sample(self, rng: np.random.Generator, count: int) -> tuple[TokenColumn, TokenColumn]:
        """``count`` draws of (input tokens, output tokens)."""
        classes = TokenHistogram.of(np.arange(1.0, len(self.shares) + 1), self.shares).sample(rng, count) - 1
        return (
            self._between(self.input_quantiles, classes, rng.random(count)),
            self._between(self.output_quantiles, classes, rng.random(count)),
        )

    def _between(
        self, quantiles: NDArray[np.float64], row: TokenColumn, probability: NDArray[np.float64]
    ) -> TokenColumn:
        """Tokens at ``probability`` of each picked row; floored, so that a class's last quantile is never passed."""
        left = np.searchsorted(self.probabilities, probability, side="right") - 1
        part = (probability - self.probabilities[left]) / np.diff(self.probabilities)[left]
        logs = np.log(quantiles)
        value = logs[row, left] + part * (logs[row, left + 1] - logs[row, left])
        tokens: TokenColumn = np.maximum(np.floor(np.exp(value) + 1e-9), 1).astype(np.int32)
        return tokens

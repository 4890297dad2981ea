"""Arrivals and Workload: what requests come, when, and how long they are.

A Workload is a stream of column chunks in order of arrival. It can be begun any number of times and gives the same
requests each time: everything random about it was fixed by a seed when it was made. It never holds more than a
chunk, so a week of 16.8 million requests costs a few megabytes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatColumn = NDArray[np.float64]
TokenColumn = NDArray[np.int32]

CHUNK_ROWS = 65_536


class WorkloadError(ValueError):
    """A trace or a wanted workload is wrong; the message names the file, the line and the fix."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests in order of arrival, as three columns of equal length n."""

    arrival_s: FloatColumn  # shape (n,), seconds since the workload began, never falling
    input_tokens: TokenColumn  # shape (n,), >= 1
    output_tokens: TokenColumn  # shape (n,), >= 1

    def __post_init__(self) -> None:
        if not self.arrival_s.shape == self.input_tokens.shape == self.output_tokens.shape:
            raise WorkloadError("the columns of a chunk must be of one length")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def at(self, index: slice | NDArray[np.bool_] | NDArray[np.intp]) -> "Arrivals":
        """The rows that a slice, a mask or an array of positions picks."""
        return Arrivals(self.arrival_s[index], self.input_tokens[index], self.output_tokens[index])

    def moved(self, by_s: float) -> "Arrivals":
        """The same requests, ``by_s`` later."""
        return Arrivals(self.arrival_s + by_s, self.input_tokens, self.output_tokens)

    def sorted(self) -> "Arrivals":
        """The same requests in order of arrival; equal times keep their order."""
        return self.at(np.argsort(self.arrival_s, kind="stable"))

    @staticmethod
    def of(arrival_s: Iterable[float], input_tokens: Iterable[int], output_tokens: Iterable[int]) -> "Arrivals":
        """Arrivals from any three columns."""
        return Arrivals(
            np.fromiter(arrival_s, np.float64),
            np.fromiter(input_tokens, np.int32),
            np.fromiter(output_tokens, np.int32),
        )

    @staticmethod
    def joined(parts: Iterable["Arrivals"]) -> "Arrivals":
        """All rows of all parts, one after the other."""
        kept = list(parts)
        if not kept:
            return Arrivals.of((), (), ())
        return Arrivals(
            np.concatenate([part.arrival_s for part in kept]),
            np.concatenate([part.input_tokens for part in kept]),
            np.concatenate([part.output_tokens for part in kept]),
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """A named stream of arrivals.

    ``begin`` starts the stream anew; ``starts_unix_s`` is the moment that its second 0 stands for, where the source
    has one (the hour of day moves grid intensity and forecasts); ``assumptions`` says what was done to the source,
    for whoever prints a result.
    """

    name: str
    duration_s: float
    expected_requests: float  # exact for a recorded trace, else an expectation; of a window, by its share of time
    begin: Callable[[], Iterator[Arrivals]]
    starts_unix_s: float | None = None
    assumptions: tuple[str, ...] = ()

    def chunks(self) -> Iterator[Arrivals]:
        """The requests from the first on, in chunks that follow each other in time; none is empty."""
        return (chunk for chunk in self.begin() if len(chunk))

    def collect(self) -> Arrivals:
        """Everything at once; for workloads known to be small."""
        return Arrivals.joined(self.chunks())

    @property
    def mean_rate_rps(self) -> float:
        """Expected requests per second over the whole of it."""
        return self.expected_requests / self.duration_s if self.duration_s > 0 else 0.0


def recorded(name: str, arrivals: Arrivals, duration_s: float | None = None) -> Workload:
    """A workload of requests at hand. ``duration_s`` is the last arrival unless given."""
    last_s = float(arrivals.arrival_s[-1]) if len(arrivals) else 0.0

    def begin() -> Iterator[Arrivals]:
        for start in range(0, len(arrivals), CHUNK_ROWS):
            yield arrivals.at(slice(start, start + CHUNK_ROWS))

    return Workload(name, last_s if duration_s is None else duration_s, float(len(arrivals)), begin)

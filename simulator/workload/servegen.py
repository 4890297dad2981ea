"""A population of clients, each with its own rate, burstiness and lengths: the shape of the ServeGen data. Pure.

ServeGen (alibaba/ServeGen) describes production traffic client by client: for each window of 600 s the requests of
the window and a gamma or Weibull renewal process fitted to their gaps, and for each 6 h a histogram of input and one of
output lengths, independent of each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from simulator.workload.arrivals import Arrivals, FloatColumn, Workload, WorkloadError
from simulator.workload.lengths import IndependentLengths
from simulator.workload.processes import filled, gamma_gaps, weibull_gaps, whole_count

GAPS: dict[str, Callable[[np.random.Generator, int, float], FloatColumn]] = {
    "Gamma": gamma_gaps,
    "Weibull": weibull_gaps,
}


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """What one client does in one window."""

    requests: float
    process: str  # a key of GAPS
    shape: float  # of its gap distribution


@dataclass(frozen=True, slots=True)
class Client:
    """One source of requests over time."""

    id: int
    windows: dict[int, ClientWindow]  # window number -> what it does; absent = nothing
    lengths: dict[float, IndependentLengths]  # start_s -> lengths from then on; may be empty

    def lengths_at(self, time_s: float) -> IndependentLengths | None:
        """Its lengths at that time: the latest known then, else its first; None if it has none at all."""
        known = [start_s for start_s in self.lengths if start_s <= time_s]
        if known:
            return self.lengths[max(known)]
        return self.lengths[min(self.lengths)] if self.lengths else None


def population(
    name: str, clients: tuple[Client, ...], window_s: float, windows: int, seed: int, rate_scale: float = 1.0
) -> Workload:
    """The superposition of all clients, each at ``rate_scale`` times its rate; a chunk is one window.

    Clients without lengths of their own take those of the other clients of that window, each other client weighted
    by its requests. Raises WorkloadError when no client has lengths or the scale is not above 0.
    """
    if not rate_scale > 0:
        raise WorkloadError(f"{name}: a rate scale of {rate_scale:g} is not above 0")
    if not any(client.lengths for client in clients):
        raise WorkloadError(f"{name}: no client has a length histogram")
    expected = sum(window.requests for client in clients for window in client.windows.values()) * rate_scale

    def begin() -> Iterator[Arrivals]:
        for number in range(windows):
            yield _window(clients, number, window_s, seed, rate_scale)

    return Workload(
        name,
        window_s * windows,
        expected,
        begin,
        None,
        (
            f"clients' gaps drawn, requests per window as published x{rate_scale:g}, seed {seed}",
            "input and output lengths drawn apart (the source has marginals only); clients without lengths take the "
            "other clients'",
        ),
    )


def _window(clients: tuple[Client, ...], number: int, window_s: float, seed: int, rate_scale: float) -> Arrivals:
    start_s = number * window_s
    parts: list[Arrivals] = []
    nameless: list[tuple[np.random.Generator, FloatColumn]] = []
    donors: list[tuple[IndependentLengths, float]] = []
    for client in clients:
        window = client.windows.get(number)
        if window is None:
            continue
        rng = np.random.default_rng([seed, number, client.id])
        count = whole_count(rng, window.requests * rate_scale)
        times_s = filled(GAPS[window.process](rng, count + 1, window.shape), window_s) + start_s
        lengths = client.lengths_at(start_s)
        if lengths is None:
            nameless.append((rng, times_s))
            continue
        donors.append((lengths, window.requests))
        parts.append(Arrivals(times_s, *lengths.sample(rng, count)))
    if nameless:
        if not donors:  # every client of this window is without lengths: anybody's will do
            donors = [(known, 1.0) for client in clients if (known := client.lengths_at(start_s)) is not None]
        parts.extend(_borrowed(rng, times_s, donors) for rng, times_s in nameless)
    return Arrivals.joined(parts).sorted()


def _borrowed(
    rng: np.random.Generator, times_s: FloatColumn, donors: list[tuple[IndependentLengths, float]]
) -> Arrivals:
    """Requests at these times with the lengths of the donors, mixed by weight."""
    weights = np.array([weight for _, weight in donors])
    counts = rng.multinomial(len(times_s), weights / weights.sum())
    drawn = [lengths.sample(rng, int(count)) for (lengths, _), count in zip(donors, counts, strict=True)]
    order = rng.permutation(len(times_s))
    return Arrivals(
        times_s,
        np.concatenate([pair[0] for pair in drawn])[order],
        np.concatenate([pair[1] for pair in drawn])[order],
    )

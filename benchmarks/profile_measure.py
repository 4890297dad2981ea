"""A sweep of loads over one served instance: which loads, the closed loop that makes one, and the row it gives. Pure.

A closed loop is ``ROUNDS`` requests from each of its clients, every one counted, as the fit replays it
(``energy.closed_loop``): the burst at its start and the tail at its end are part of both. An open loop is a Poisson
process of one rate. Rows are those of the measured-profile CSV (docs/profiles.md, "A profile of your own GPU").
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from benchmarks.replay import Clock, Endpoint, Outcome, ReplayRequest
from energy.closed_loop import LoadShape
from simulator.workload.arrivals import Arrivals

ROUNDS = LoadShape(1.0, 1.0, 1).rounds  # what a fit takes a row's closed loop to have been
COLUMNS = (
    *("gpu", "model", "tp", "sm_clock_mhz", "input_tokens", "output_tokens", "concurrency", "rate_rps"),
    *("ttft_s", "tbt_s", "ttft_p99_s", "tbt_p99_s", "power_w", "precision", "engine", "source"),
)
KEY = ("sm_clock_mhz", "concurrency", "rate_rps", "source")
MOST_FAILURES = 0.01  # of the requests of one load; beyond it the row would describe something else


class LoadFailedError(Exception):
    """A load could not be measured; the message says what its requests met."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is measured: the columns that are the same in every row."""

    gpu: str
    model: str
    tp: int
    precision: str
    engine: str = "vllm"


@dataclass(frozen=True, slots=True)
class Load:
    """One load: lengths in tokens, an SM clock, and either clients of a closed loop or the rate of an open one."""

    sm_clock_mhz: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None
    rate_rps: float | None = None

    def requests(self, open_s: float) -> int:
        """How many requests it sends, on average; ``open_s``: how long an open loop lasts."""
        return ROUNDS * self.concurrency if self.concurrency else max(1, round((self.rate_rps or 0.0) * open_s))

    @property
    def source(self) -> str:
        """The row's source: lengths as they were asked for, since those measured may be a token off."""
        return f"dynamollm profile measure {self.input_tokens}+{self.output_tokens}"

    def key(self) -> tuple[str, ...]:
        """What tells its row from others, as the cells of ``KEY`` say it."""
        return cell(self.sm_clock_mhz), cell(self.concurrency), cell(self.rate_rps), self.source

    def __str__(self) -> str:
        how = f"{self.concurrency} clients" if self.concurrency else f"{self.rate_rps:g} requests/s"
        return f"{self.input_tokens} + {self.output_tokens} tokens, {how}, {self.sm_clock_mhz} MHz"


def sweep(
    sm_clocks_mhz: Iterable[int],
    lengths: Iterable[tuple[int, int]],
    concurrencies: Sequence[int],
    rates_rps: Sequence[float],
) -> list[Load]:
    """Every load once, one clock after the other, the lightest first."""
    loads = []
    for clock_mhz, (input_tokens, output_tokens) in product(sm_clocks_mhz, lengths):
        loads += [Load(clock_mhz, input_tokens, output_tokens, clients) for clients in sorted(concurrencies)]
        loads += [Load(clock_mhz, input_tokens, output_tokens, None, rate) for rate in sorted(rates_rps)]
    return list(dict.fromkeys(loads))


def poisson(load: Load, open_s: float, seed: int) -> Arrivals:
    """Arrivals of an open loop; the same for the same seed, at least one."""
    rate_rps = load.rate_rps or 0.0
    rng = np.random.default_rng(seed)
    times_s = np.cumsum(rng.exponential(1.0 / rate_rps, load.requests(open_s)))
    count = len(times_s)
    return Arrivals.of(times_s.tolist(), [load.input_tokens] * count, [load.output_tokens] * count)


@dataclass(slots=True)
class ClosedLoop:
    """``concurrency`` clients that each send their next request when the last one has ended."""

    load: Load
    endpoint: Endpoint
    clock: Clock
    record: Callable[[Outcome], None]
    _sent: int = field(default=0)

    async def run(self) -> None:
        """Send all rounds."""
        clients = self.load.concurrency or 1
        async with asyncio.TaskGroup() as tasks:
            for _ in range(clients):
                tasks.create_task(self._client(ROUNDS * clients))

    async def _client(self, total: int) -> None:
        while self._sent < total:
            number, self._sent = self._sent, self._sent + 1
            request = ReplayRequest(number, self.clock.now_s(), self.load.input_tokens, self.load.output_tokens)
            self.record(await self.endpoint.complete(request))


def row_of(kind: Kind, load: Load, outcomes: Sequence[Outcome], power_w: float | None) -> dict[str, str]:
    """The CSV's row of one load: means and P99 over requests. Raises ``LoadFailedError``."""
    failed = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if not outcomes or len(failed) > MOST_FAILURES * len(outcomes):
        reasons = "; ".join(sorted({reason for reason in failed if reason})[:3]) or "nothing was sent"
        raise LoadFailedError(f"{load}: {len(failed)} of {len(outcomes)} requests failed: {reasons}")
    finished = [outcome for outcome in outcomes if outcome.failure is None]
    ttft_s = [outcome.ttft_s for outcome in finished if outcome.ttft_s is not None]
    tbt_s = [outcome.mean_tbt_s for outcome in finished if outcome.mean_tbt_s is not None]
    if not ttft_s or not tbt_s:
        raise LoadFailedError(f"{load}: no answer had two tokens; ask for more output tokens")
    values = (
        *(kind.gpu, kind.model, kind.tp, load.sm_clock_mhz),
        float(np.mean([outcome.prompt_tokens or load.input_tokens for outcome in finished])),
        float(np.mean([outcome.completion_tokens or load.output_tokens for outcome in finished])),
        *(load.concurrency, load.rate_rps),
        *(float(np.mean(ttft_s)), float(np.mean(tbt_s))),
        *(float(np.percentile(ttft_s, 99)), float(np.percentile(tbt_s, 99))),
        *(power_w, kind.precision, kind.engine, load.source),
    )
    return {column: cell(value) for column, value in zip(COLUMNS, values, strict=True)}


def cell(value: object) -> str:
    """A value as the CSV has it; nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""One replay over real sockets in real time: probe the target, play, stop on Ctrl-C, report."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarks.adapters.clock import MonotonicClock
from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.adapters.target_facts import TargetError, energy_counter_j, first_model, probe_prompts
from benchmarks.replay import Outcome, Replay, ReplayRequest
from benchmarks.replay_report import ReplayReport, Tally
from pools.classes import ClassSlos
from simulator.workload.arrivals import Arrivals

try:
    import resource
except ImportError:  # not POSIX: no such limit to raise
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class ReplayOrder:
    """What to replay, against what."""

    trace: str
    arrivals: Arrivals
    target: Target
    model: str | None = None  # None: the first the target lists
    chat: bool = True
    speedup: float = 1.0
    timeout_s: float = 600.0
    gpu_telemetry: str | None = None  # URL of metrics with the GPUs' energy; None: the target's own, if it tells
    slos: ClassSlos = field(default_factory=ClassSlos)


async def run_replay(order: ReplayOrder, on_done: Callable[[int], None] = lambda done: None) -> ReplayReport:
    """Play the order to its end, or to SIGINT; ``on_done`` is told how many requests have ended.

    Raises TargetError if the target cannot be replayed against at all.
    """
    clock = MonotonicClock()
    model = order.model or await first_model(order.target)
    bodies = await probe_prompts(order.target, model, order.chat, clock)
    energy_before_j = await _energy_j(order)

    tally = Tally(order.slos)
    streams = HttpStreams(order.target, bodies.path, bodies.render, clock, order.timeout_s)

    def record(request: ReplayRequest, outcome: Outcome) -> None:
        tally.add(request, outcome)
        on_done(tally.finished + tally.failed)

    replay = Replay(order.arrivals, streams, clock, record, order.speedup)
    _allow_many_connections()
    began_s = clock.now_s()
    with _stopped_by_interrupt(replay.stop), _without_long_pauses():
        await replay.run()
    wall_s = clock.now_s() - began_s
    streams.close()
    energy_after_j = await _energy_j(order)
    return tally.report(
        trace=order.trace,
        url=order.target.url,
        model=model,
        speedup=order.speedup,
        planned=len(order.arrivals),
        wall_s=wall_s,
        gpu_energy_j=None if energy_before_j is None or energy_after_j is None else energy_after_j - energy_before_j,
    )


async def _energy_j(order: ReplayOrder) -> float | None:
    """The GPUs' energy so far; None if nobody was named who must tell, and the target does not."""
    if order.gpu_telemetry is not None:
        return await energy_counter_j(order.gpu_telemetry)
    try:
        return await energy_counter_j(f"{order.target.url}/metrics")
    except TargetError:
        return None


@contextlib.contextmanager
def _stopped_by_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set ``stop`` while inside; a second one acts as it does elsewhere."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    with contextlib.ExitStack() as installed:
        for number in signals:
            # only the main thread can; elsewhere whoever runs us stops us
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, on_signal)
                installed.callback(loop.remove_signal_handler, number)
        yield


@contextlib.contextmanager
def _without_long_pauses() -> Iterator[None]:
    """Keep what is loaded out of garbage collection: a full pass over it would make the replay late."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: each open stream is a file."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses an unlimited soft limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

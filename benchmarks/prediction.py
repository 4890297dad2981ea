"""What the engine model says of one instance and a list of requests: virtual time, one engine, no router. Pure.

The same ``simulator.engine`` that emulated instances run; here its steps follow each other without waiting. A request
that arrives during a step is scheduled in the next, as in a real engine. Network and tokenizing are not in it.
"""

from dataclasses import dataclass

import numpy as np

from simulator.engine import Engine
from simulator.workload.arrivals import Arrivals


@dataclass(frozen=True, slots=True)
class Latencies:
    """What one run showed, predicted or measured; one element a request that finished, nan where it has none."""

    ttft_s: np.ndarray[tuple[int], np.dtype[np.float64]]
    tbt_s: np.ndarray[tuple[int], np.dtype[np.float64]]  # mean of each request
    output_tokens: int
    span_s: float  # first arrival to last token
    busy_share: float = float("nan")  # of the span that steps took

    def figures(self) -> dict[str, float]:
        """What runs are compared by."""
        return {
            "ttft_p50_s": float(np.nanpercentile(self.ttft_s, 50)),
            "ttft_p99_s": float(np.nanpercentile(self.ttft_s, 99)),
            "tbt_mean_s": float(np.nanmean(self.tbt_s)),
            "output_tokens_per_s": self.output_tokens / self.span_s,
        }


def predict(engine: Engine, arrivals: Arrivals) -> Latencies:
    """Serve the requests on an idle engine."""
    count = len(arrivals)
    arrival_s = arrivals.arrival_s.tolist()
    first_s, last_s = np.full(count, np.nan), np.full(count, np.nan)
    now_s, busy_s, sent = 0.0, 0.0, 0
    while True:
        while sent < count and arrival_s[sent] <= now_s:
            engine.submit(sent, int(arrivals.input_tokens[sent]), int(arrivals.output_tokens[sent]), arrival_s[sent])
            sent += 1
        step = engine.start_step(now_s)
        if step is None:
            if sent == count:
                break
            now_s = arrival_s[sent]
            continue
        now_s += step.duration_s
        busy_s += step.duration_s
        for request in engine.finish_step().emitted:
            if np.isnan(first_s[request]):
                first_s[request] = now_s
            last_s[request] = now_s
    gaps = np.maximum(arrivals.output_tokens - 1, 1)
    tbt_s = np.where(arrivals.output_tokens > 1, (last_s - first_s) / gaps, np.nan)
    span_s = now_s - arrival_s[0]
    return Latencies(first_s - arrivals.arrival_s, tbt_s, int(arrivals.output_tokens.sum()), span_s, busy_s / span_s)


def differences(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """Predicted over measured, less one, of each figure."""
    return {name: predicted[name] / measured[name] - 1.0 for name in measured}

"""EngineMetrics: what an instance counts, as Prometheus text under vLLM 0.32's names, labels and buckets.

Pure: it is told of every event and renders on demand. What the emulator has no notion of (prefix cache, KV transfer,
multimodal cache) is there and stays 0. ``*_created`` series are left out.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TBT_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Cumulative buckets, as Prometheus wants them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self.counts = [0] * (len(bounds) + 1)  # of each bucket alone; the last is beyond every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        """Its series."""
        lines, below = [], 0
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {float(below)}')
        return [*lines, f"{name}_count{{{labels}}} {float(below)}", f"{name}_sum{{{labels}}} {self.total}"]


@dataclass(slots=True)
class SequenceTimes:
    """When one sequence came, began, spoke first and last; seconds of the instance's clock."""

    input_tokens: int
    arrival_s: float
    scheduled_s: float = -1.0
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """What the engine is doing at the moment of a scrape."""

    running: int
    waiting: int
    kv_usage: float  # 0..1
    sleep_level: int  # 0 = awake


def _tokens() -> Histogram:
    return Histogram(TOKEN_BUCKETS)


def _request_seconds() -> Histogram:
    return Histogram(REQUEST_BUCKETS_S)


@dataclass(slots=True)
class EngineMetrics:
    """Counters and histograms of one instance since it started."""

    model: str
    kv_blocks: int
    block_tokens: int
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    rejected_requests: int = 0
    iteration_tokens: Histogram = field(default_factory=lambda: Histogram(ITERATION_BUCKETS))
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    request_max_tokens: Histogram = field(default_factory=_tokens)
    request_choices: Histogram = field(default_factory=lambda: Histogram(CHOICE_BUCKETS))
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BUCKETS_S))
    tbt: Histogram = field(default_factory=lambda: Histogram(TBT_BUCKETS_S))
    request_tpot: Histogram = field(default_factory=lambda: Histogram(TBT_BUCKETS_S))
    request_e2e: Histogram = field(default_factory=_request_seconds)
    request_queue: Histogram = field(default_factory=_request_seconds)
    request_inference: Histogram = field(default_factory=_request_seconds)
    request_prefill: Histogram = field(default_factory=_request_seconds)
    request_decode: Histogram = field(default_factory=_request_seconds)
    request_preemptions: Histogram = field(default_factory=lambda: Histogram(PREEMPTION_BUCKETS))

    def on_step(self, prefill_tokens: int, decode_seqs: int, preempted: int) -> None:
        """A step began."""
        self.iteration_tokens.observe(prefill_tokens + decode_seqs)
        self.preemptions += preempted

    def on_token(self, times: SequenceTimes, at_s: float) -> None:
        """A sequence got a token."""
        self.generation_tokens += 1
        if times.first_token_s < 0:
            times.first_token_s = at_s
            self.prompt_tokens += times.input_tokens
            self.ttft.observe(max(0.0, at_s - times.arrival_s))  # a late loop may count back
        else:
            self.tbt.observe(at_s - times.last_token_s)
        times.last_token_s = at_s

    def on_end(self, times: SequenceTimes, tokens: int, reason: str, at_s: float) -> None:
        """A sequence ended after ``tokens`` output tokens; a client that left is not counted, as in vLLM."""
        self.finished[reason] += 1
        self.request_prompt_tokens.observe(times.input_tokens)
        self.request_generation_tokens.observe(tokens)
        self.request_preemptions.observe(times.preemptions)
        self.request_e2e.observe(at_s - times.arrival_s)
        if times.first_token_s < 0:
            return
        scheduled_s = times.scheduled_s if times.scheduled_s >= 0 else times.arrival_s
        self.request_queue.observe(scheduled_s - times.arrival_s)
        self.request_prefill.observe(times.first_token_s - scheduled_s)
        self.request_decode.observe(times.last_token_s - times.first_token_s)
        self.request_inference.observe(times.last_token_s - scheduled_s)
        if tokens > 1:
            self.request_tpot.observe((times.last_token_s - times.first_token_s) / (tokens - 1))

    def render(self, gauges: EngineGauges) -> bytes:
        """Prometheus text."""
        labels = f'engine="0",model_name="{_escaped(self.model)}"'
        lines: list[str] = []
        self._render_gauges(lines, gauges, labels)
        self._render_counters(lines, labels)
        self._render_histograms(lines, labels)
        return ("\n".join(lines) + "\n").encode()

    def _render_gauges(self, lines: list[str], gauges: EngineGauges, labels: str) -> None:
        _family(lines, "num_requests_running", "gauge", "Sequences in the batch.", [(labels, gauges.running)])
        _family(lines, "num_requests_waiting", "gauge", "Sequences that wait.", [(labels, gauges.waiting)])
        reasons = [(f'{labels},reason="capacity"', gauges.waiting), (f'{labels},reason="deferred"', 0)]
        _family(lines, "num_requests_waiting_by_reason", "gauge", "Sequences that wait, by reason.", reasons)
        level = gauges.sleep_level
        states = [("awake", level == 0), ("weights_offloaded", level == 1), ("discard_all", level == 2)]
        samples = [(f'{labels},sleep_state="{state}"', int(on)) for state, on in states]
        _family(lines, "engine_sleep_state", "gauge", "1 for the state the engine is in.", samples)
        _family(lines, "kv_cache_usage_perc", "gauge", "KV blocks in use, 0 to 1.", [(labels, gauges.kv_usage)])
        config = (
            f'block_size="{self.block_tokens}",cache_dtype="auto",enable_prefix_caching="False",engine="0",'
            f'gpu_memory_utilization="0.92",kv_cache_size_tokens="{self.kv_blocks * self.block_tokens}",'
            f'num_gpu_blocks="{self.kv_blocks}",sliding_window="None"'
        )
        _family(lines, "cache_config_info", "gauge", "How the KV cache is laid out.", [(config, 1)])

    def _render_counters(self, lines: list[str], labels: str) -> None:
        for name, value, text in (
            ("num_preemptions", self.preemptions, "Sequences thrown back to the queue."),
            ("prompt_tokens", self.prompt_tokens, "Prompt tokens computed."),
            ("generation_tokens", self.generation_tokens, "Tokens generated."),
            ("prefix_cache_queries", 0, "Tokens looked up in the prefix cache."),
            ("prefix_cache_hits", 0, "Tokens found in the prefix cache."),
            ("external_prefix_cache_queries", 0, "Tokens looked up in an external prefix cache."),
            ("external_prefix_cache_hits", 0, "Tokens found in an external prefix cache."),
            ("mm_cache_queries", 0, "Items looked up in the multimodal cache."),
            ("mm_cache_hits", 0, "Items found in the multimodal cache."),
            ("prompt_tokens_cached", 0, "Prompt tokens found in a cache."),
        ):
            _family(lines, f"{name}_total", "counter", text, [(labels, value)])
        sources = ("local_compute", self.prompt_tokens), ("local_cache_hit", 0), ("external_kv_transfer", 0)
        samples = [(f'{labels},source="{source}"', value) for source, value in sources]
        _family(lines, "prompt_tokens_by_source_total", "counter", "Prompt tokens, by where they came from.", samples)
        samples = [(f'{labels},finished_reason="{reason}"', count) for reason, count in self.finished.items()]
        _family(lines, "request_success_total", "counter", "Sequences ended, by reason.", samples)
        model = labels.partition(",")[2]
        limits = ("max_num_queued_reqs", self.rejected_requests), ("max_num_queued_tokens", 0)
        samples = [(f'{model},reason="{reason}"', count) for reason, count in limits]
        _family(lines, "admission_rejections_total", "counter", "Requests refused by a queue limit.", samples)

    def _render_histograms(self, lines: list[str], labels: str) -> None:
        for name, histogram, text in (
            ("iteration_tokens_total", self.iteration_tokens, "Tokens of a step."),
            ("request_prompt_tokens", self.request_prompt_tokens, "Prompt tokens of a request."),
            ("request_generation_tokens", self.request_generation_tokens, "Output tokens of a request."),
            ("request_params_n", self.request_choices, "Choices asked for."),
            ("request_params_max_tokens", self.request_max_tokens, "Output tokens asked for at most."),
            ("time_to_first_token_seconds", self.ttft, "Arrival to first token."),
            ("inter_token_latency_seconds", self.tbt, "Between two tokens of a sequence."),
            ("request_time_per_output_token_seconds", self.request_tpot, "Mean time of an output token."),
            ("e2e_request_latency_seconds", self.request_e2e, "Arrival to last token."),
            ("request_queue_time_seconds", self.request_queue, "Arrival to first step."),
            ("request_inference_time_seconds", self.request_inference, "First step to last token."),
            ("request_prefill_time_seconds", self.request_prefill, "First step to first token."),
            ("request_decode_time_seconds", self.request_decode, "First token to last token."),
            ("request_num_preemptions", self.request_preemptions, "Times a request was thrown back."),
        ):
            lines.append(f"# HELP vllm:{name} {text}")
            lines.append(f"# TYPE vllm:{name} histogram")
            lines += histogram.lines(f"vllm:{name}", labels)


def _family(lines: list[str], name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
    lines.append(f"# HELP vllm:{name} {text}")
    lines.append(f"# TYPE vllm:{name} {kind}")
    lines += [f"vllm:{name}{{{labels}}} {float(value)}" for labels, value in samples]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

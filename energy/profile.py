"""EnergyProfile: what one engine step costs in time and power, for each tensor parallelism and SM clock.

Everything above (router, solver, engine model, accounting) asks a profile and nothing else what a configuration
costs. The hot loops do not call the profile: they take its ``StepCoefficients`` for one (TP, clock) once and evaluate
the two functions below, which use plain arithmetic only, so that the same source runs interpreted on floats,
vectorised on NumPy arrays and compiled by Numba.

Source: DynamoLLM section IV (profiles over load x TP x clock); the roofline form is ours, see docs/profiles.md.
"""

from enum import Enum
from typing import NamedTuple, Protocol


class GpuState(Enum):
    """The power state of a GPU that runs no step."""

    OFF = "off"  # released: its node is powered down or given back
    BARE = "bare"  # powered, no CUDA context
    LOADED = "loaded"  # an engine with weights is resident and idle
    PARKED = "parked"  # engine asleep, SM clock locked low


class StepCoefficients(NamedTuple):
    """What an engine step costs on one (model, GPU, TP) at one SM clock. Floats only.

    Times are of the whole instance (all its GPUs work in lock-step); powers are watts per GPU.
    """

    overhead_s: float  # host and launch time of a step; does not move with the clock
    host_s_per_seq: float  # host time of one decoding sequence (sampling, bookkeeping); does not move with the clock
    compute_s_per_token: float  # dense matrix work of one token (prefill or decode) in the batch
    attention_s_per_token2: float  # prefill attention: per (new token x token it attends to)
    weights_s: float  # streaming the weights through the memory system once
    kv_s_per_token: float  # reading the KV cache of one context token of a decoding sequence
    communication_s: float  # tensor-parallel all-reduce latency of a step; 0 at TP1
    communication_s_per_token: float  # tensor-parallel all-reduce bandwidth, per token of the batch
    sharpness: float  # exponent p of the smooth maximum of compute and memory time, >= 1
    idle_w: float  # loaded and idle at this clock
    active_w: float  # added while kernels run, whatever they do: ungated clocks, spinning all-reduces
    compute_w: float  # added at full arithmetic activity at this clock
    memory_w: float  # added at full memory-bandwidth use
    max_w: float  # board power limit


def step_time_s(
    c: StepCoefficients,
    prefill_tokens: float,
    prefill_attention_tokens2: float,
    decode_seqs: float,
    context_tokens: float,
) -> float:
    """Duration of one engine step, in seconds.

    ``prefill_tokens`` new prompt tokens and ``decode_seqs`` single tokens are in the batch;
    ``prefill_attention_tokens2`` is the sum over prompt chunks of new tokens x mean tokens attended to, for n new
    tokens behind p cached ones n * (p + n / 2);
    ``context_tokens`` is the KV read by the decoding sequences.
    """
    tokens = prefill_tokens + decode_seqs
    compute_s = c.compute_s_per_token * tokens + c.attention_s_per_token2 * prefill_attention_tokens2
    memory_s = c.weights_s + c.kv_s_per_token * context_tokens
    roofline_s: float = (compute_s**c.sharpness + memory_s**c.sharpness) ** (1.0 / c.sharpness)
    host_s = c.overhead_s + c.host_s_per_seq * decode_seqs
    return host_s + roofline_s + c.communication_s + c.communication_s_per_token * tokens


def step_power_w(
    c: StepCoefficients,
    prefill_tokens: float,
    prefill_attention_tokens2: float,
    decode_seqs: float,
    context_tokens: float,
) -> float:
    """Mean power of each GPU over that step, in watts; never above the board limit."""
    tokens = prefill_tokens + decode_seqs
    compute_s = c.compute_s_per_token * tokens + c.attention_s_per_token2 * prefill_attention_tokens2
    memory_s = c.weights_s + c.kv_s_per_token * context_tokens
    duration_s = step_time_s(c, prefill_tokens, prefill_attention_tokens2, decode_seqs, context_tokens)
    kernels_s = duration_s - c.overhead_s - c.host_s_per_seq * decode_seqs
    power_w = c.idle_w + (c.active_w * kernels_s + c.compute_w * compute_s + c.memory_w * memory_s) / duration_s
    # min() of two floats, spelled so that arrays and compiled code take it too
    over_w = power_w - c.max_w
    return power_w - over_w * (over_w > 0)


class EnergyProfile(Protocol):
    """What (model, GPU) costs at each TP and SM clock; fitted or measured."""

    @property
    def name(self) -> str:
        """Name under which it is shipped or configured, as ``llama-3.1-70b-fp8-h100``."""

    @property
    def model(self) -> str:
        """Model it describes, as ``meta-llama/Llama-3.1-70B-Instruct``."""

    @property
    def gpu(self) -> str:
        """GPU it describes, as ``H100-SXM``."""

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """Feasible tensor parallelism, ascending."""

    @property
    def sm_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks the profile holds for, ascending; the last is the default (maximum) clock."""

    def step(self, tp: int, sm_clock_mhz: float) -> StepCoefficients:
        """Coefficients of a step at this TP and clock. Raises ``ProfileRangeError`` outside the profile's range."""

    def kv_capacity_tokens(self, tp: int) -> int:
        """Tokens of KV cache that fit beside the weights on one instance."""

    def idle_power_w(self, state: GpuState, sm_clock_mhz: float) -> float:
        """Power of one GPU that runs no step, in watts."""


class ProfileError(ValueError):
    """A profile or its source data is wrong; the message names the file, the line and the fix."""


class ProfileRangeError(ProfileError):
    """A profile was asked for a TP or clock it does not hold for."""

"""Published figures about GPUs and this kind of cluster, side by side with what the shipped profiles give.

Some went into the profiles, as a prior or to place the knee (marked ``input``); the others check them.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.profile_view import PAPER_TOKENS_PER_S, energy_grid, least, rate_of_tokens
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_fitted
from energy.closed_loop import LoadShape, closed_loop
from energy.fit_power import Activity, Nuisances, mean_power_w
from energy.fitted import FittedProfile
from energy.profile import EnergyProfile, GpuState, step_power_w, step_time_s

SS, LL = 0, 8
PAPER_PROFILE = "llama-2-70b-h100"
LOW_CLOCK_MHZ = 780


@dataclass(frozen=True, slots=True)
class Anchor:
    """One published figure and ours."""

    what: str
    source: str
    published: str
    ours: str
    role: str = "check"  # or "input": the profiles were given it


def anchors() -> list[Anchor]:
    """All of them."""
    return [*_paper(), *_decode_clocks(), *_job_clocks(), *_idle(), *_gpt_oss()]


def _paper() -> list[Anchor]:
    table = load_capacity(PAPER_PROFILE)
    clocks = table.sm_clocks_mhz
    tp8 = table.tps.index(8)
    at_most = energy_grid(table, LL, None)[tp8]
    least_at = clocks[int(np.argmin(at_most))]
    curve = ", ".join(f"{clock}: {joules:.0f}" for clock, joules in zip(clocks, at_most, strict=True))
    best = [least(energy_grid(table, k, rate_of_tokens(table, k, PAPER_TOKENS_PER_S)), table) for k in range(9)]
    joules = [each[2] for each in best if each]
    ss = best[SS]
    ll_at_max = energy_grid(table, LL, rate_of_tokens(table, LL, PAPER_TOKENS_PER_S))[tp8, -1]
    feasible = ", ".join(f"TP{tp} {table.max_rate[t, -1, LL]:.2f}/s" for t, tp in enumerate(table.tps))
    tenth = table.loads.index(0.1)
    gaps = ", ".join(f"{1e3 * table.gap_p99[t, -1, LL, tenth]:.0f} ms" for t in range(len(table.tps)))
    spread = f"{max(joules) / min(joules):.0f}x"
    dynamo = "DynamoLLM, second-hand"
    return [
        Anchor(
            "LL on TP8, energy over clock",
            dynamo,
            "U-shape, least at 1.6 GHz",
            f"least at {least_at} MHz ({curve} J)",
            "input",
        ),
        Anchor(
            "SS at 2,000 tokens/s: cheapest point",
            dynamo,
            "TP2 at 1.2 GHz",
            f"TP{ss[0]} at {ss[1]} MHz, {ss[2]:.0f} J (lower clocks miss the TTFT)" if ss else "none",
        ),
        Anchor("least energy, dearest over cheapest class", dynamo, "> 10x", spread),
        Anchor(
            "LL on TP8 at the top clock over the cheapest SS, 2,000 tokens/s",
            dynamo,
            "13.21 / 0.77 Wh = 17x",
            f"{ll_at_max / ss[2]:.0f}x" if ss else "-",
        ),
        Anchor(
            "TPs that carry LL",
            dynamo,
            "essentially TP8 only",
            f"{feasible} (P99 of single gaps at a tenth of it: {gaps})",
        ),
    ]


def _decode_clocks() -> list[Anchor]:
    """Decoding on one H200, the maximum clock against 780 MHz."""
    profile = load_fitted("llama-3.1-8b-bf16-h200")
    powers, saved, slower, energy = [], [], [], []
    for sequences in (1.0, 8.0, 32.0):
        batch = (0.0, 0.0, sequences, 1000.0 * sequences)
        high, low = profile.step(1, profile.sm_clocks_mhz[-1]), profile.step(1, LOW_CLOCK_MHZ)
        watts = [step_power_w(c, *batch) for c in (high, low)]
        seconds = [step_time_s(c, *batch) for c in (high, low)]
        powers.append(watts[0])
        saved.append(watts[0] - watts[1])
        slower.append(seconds[1] / seconds[0] - 1.0)
        energy.append(1.0 - watts[1] * seconds[1] / (watts[0] * seconds[0]))
    source = "arXiv 2605.11999"
    return [
        Anchor(
            "decode power of one H200",
            source,
            "137-300 W",
            f"{min(powers):.0f}-{max(powers):.0f} W (8B, 1-32 sequences)",
        ),
        Anchor(
            f"1980 -> {LOW_CLOCK_MHZ} MHz, decoding",
            source,
            "saves 47-90 W",
            f"saves {min(saved):.0f}-{max(saved):.0f} W",
            "input",
        ),
        Anchor(
            f"decode energy saved at {LOW_CLOCK_MHZ} MHz, and its price",
            source,
            "up to 32 % at < 1 % throughput (best clock)",
            f"{100 * min(energy):.0f}-{100 * max(energy):.0f} % at {100 * min(slower):.1f}-{100 * max(slower):.1f} %",
            "input",
        ),
    ]


def _job_clocks() -> list[Anchor]:
    source = "mertside/ai-inference-energy"
    rows = []
    for name, tp, clock, published in (
        ("llama-3.1-8b-bf16-h100", 1, 840, "840 MHz, -19 %"),
        ("llama-2-70b-a100", 2, 810, "810 MHz, -37 %"),
    ):
        profile = load_fitted(name)
        top = profile.sm_clocks_mhz[-1]
        clocks = range(600, top + 1, 15)
        joules = {each: _job_j(profile, tp, each) for each in (*clocks, clock, top)}
        best = min(joules, key=lambda each: joules[each])
        ours = (
            f"{clock} MHz: {100 * (joules[clock] / joules[top] - 1):+.0f} %; "
            f"least at {best} MHz: {100 * (joules[best] / joules[top] - 1):+.0f} %"
        )
        rows.append(Anchor(f"one LLaMA job on {profile.gpu}: optimal clock", source, published, ours))
    return rows


def _job_j(profile: EnergyProfile, tp: int, sm_clock_mhz: float) -> float:
    """Energy of one GPU over a lone request of 128 input and 256 output tokens."""
    c = profile.step(tp, sm_clock_mhz)
    loop = closed_loop(c, LoadShape(128.0, 256.0, 1, rounds=1))
    power_w = c.idle_w + c.active_w * loop.kernels_share + c.compute_w * loop.compute_share
    return (power_w + c.memory_w * loop.memory_share) * loop.duration_s


def _idle() -> list[Anchor]:
    profile = load_fitted("llama-3.1-70b-fp8-h100")
    top = profile.sm_clocks_mhz[-1]
    bare, loaded, parked = (
        profile.idle_power_w(state, top) for state in (GpuState.BARE, GpuState.LOADED, GpuState.PARKED)
    )
    saved = f"{100 * (1 - parked / loaded):.0f} %"
    return [
        Anchor(
            "H100 without context / loaded and idle",
            "measured",
            "71.8 / 121.7 W",
            f"{bare:.1f} / {loaded:.1f} W",
            "input",
        ),
        Anchor("what a context costs", "arXiv 2605.23918", "26-66 W", f"{loaded - bare:.0f} W"),
        Anchor(
            "idle power saved at low clocks", "arXiv 2604.04745", "22 %", f"{saved} (parked, {parked:.0f} W)", "input"
        ),
    ]


# gpt-oss-120B from its model card: bytes of dense weights and of all experts (4.25 bits each), active parameters
_GPT_OSS_DENSE_BYTES, _GPT_OSS_EXPERT_BYTES, _GPT_OSS_ACTIVE = 3.1e9, 61e9, 5.1e9
_GPT_OSS_EXPERTS, _GPT_OSS_EXPERTS_PER_TOKEN, _GPT_OSS_LAYERS, _LLAMA_70B_LAYERS = 128, 4, 36, 80


def _gpt_oss() -> list[Anchor]:
    """GPT-OSS-120B in FP4 on 8 x H100, 1K/1K: a model no profile knows, from the H100's powers and our host times."""
    profile = load_fitted("llama-3.1-70b-fp8-h100")
    points = ((8, 4, 159), (8, 8, 173), (8, 16, 189), (8, 32, 205), (4, 64, 301), (2, 64, 397))
    watts = [_gpt_oss_w(profile, tp, clients) for tp, clients, _ in points]
    where = ", ".join(f"TP{tp} x {clients}" for tp, clients, _ in points)
    return [
        Anchor(
            f"W per H100, gpt-oss-120B, {where}",
            "public benchmark thread",
            " / ".join(str(published) for *_, published in points),
            " / ".join(f"{each:.0f}" for each in watts),
        )
    ]


def _gpt_oss_w(profile: FittedProfile, tp: int, sequences: int) -> float:
    """Power of a decode step that reads the experts its batch touches, as much prompt as output being processed."""
    gpu, times = profile.physics, profile.times[tp]
    touched = 1.0 - (1.0 - _GPT_OSS_EXPERTS_PER_TOKEN / _GPT_OSS_EXPERTS) ** sequences
    weight_bytes = _GPT_OSS_DENSE_BYTES + touched * _GPT_OSS_EXPERT_BYTES
    memory_s = weight_bytes / (tp * 0.82 * gpu.bandwidth_bytes_per_s)
    # FP4 weights are computed in bf16; prompts as long as outputs double the tokens
    compute_s = 2.0 * sequences * 2.0 * _GPT_OSS_ACTIVE / (tp * 0.5 * gpu.flops_per_s["bf16"])
    layers = _GPT_OSS_LAYERS / _LLAMA_70B_LAYERS
    host_s = times.overhead_s * layers + times.host_s_per_seq * sequences
    step_s = host_s + times.communication_s * layers + memory_s + compute_s
    activity = Activity(
        "", gpu.max_clock_mhz, 1.0 - host_s / step_s, compute_s / step_s, memory_s / step_s, power_w=1.0
    )
    return mean_power_w(gpu, activity, Nuisances())

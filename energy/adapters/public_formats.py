"""Rows of the public data sets that the shipped profiles are fitted from, each with what its generator really did.

aiconfigurator's Llama rows of ``vllm`` and ``trtllm`` on 1024/8192-token shapes are InferenceMAX runs: lengths spread
over 80..100 % of nominal, ten requests a client, the engine's batch limited to the number of clients, 8192 tokens a
step. Its TensorRT-LLM 1.0.0rc3 rows run one sequence fewer than there are clients: in every round one request waits
for a whole other one, which is how their TTFT falls as concurrency grows; and they show no burst of a start, so the
first rounds are taken as warm-up. Splitwise's rows are static batches, its
power a share of TDP, zero where none was measured. ML.ENERGY's are a served batch with its own step time and power.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from energy.closed_loop import LoadShape
from energy.measurements import Measurement, ServedPower

AICONFIGURATOR = {"backend", "model_path", "system", "isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms"}
ML_ENERGY = {"Model", "GPU", "TP", "Avg TPOT (s)", "Avg BS (reqs)", "avg_W_per_gpu"}
SPLITWISE = {"model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "average_power"}

_SYSTEMS = {"h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM"}
_HARDWARE = {"a100-80gb": "A100-80GB-SXM", "h100-80gb": "H100-SXM"}
_ML_ENERGY_GPUS = {"NVIDIA H100 80GB HBM3": "H100-SXM", "NVIDIA A100-SXM4-40GB": "A100-40GB-SXM"}
_TDP_W = {"A100-80GB-SXM": 400.0, "H100-SXM": 700.0}
_SPLITWISE_MODELS = {"llama2-70b": "meta-llama/Llama-2-70b-hf", "bloom-176b": "bigscience/bloom"}
_MODELS = {
    "meta-llama/Llama-3.1-70B": "meta-llama/Llama-3.1-70B-Instruct",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-405B-Instruct": "meta-llama/Llama-3.1-405B-Instruct",
}
_UNLIMITED_BUDGET = 10**9
# an average this far below the peak was taken over mostly idle time (seen with 8192-token prompts)
_HIGHEST_PEAK_TO_MEAN = 4.0

Cells = dict[str, str]


def aiconfigurator_row(where: str, cells: Cells) -> Measurement:
    """One end-to-end measurement of aiconfigurator."""
    clients = int(float(cells["concurrency"]))
    backend, version = cells["backend"], cells["backend_version"]
    is_inferencemax = "measured=" in cells["silicon_data_source"]
    runs_one_fewer = backend == "trtllm" and version == "1.0.0rc3"
    model = cells["model_path"]
    return Measurement(
        where=where,
        gpu=_SYSTEMS.get(cells["system"], cells["system"]),
        model=_MODELS.get(model, model),
        precision=cells["precision"] or "bf16",
        engine=f"{backend} {version}".strip(),
        tp=int(float(cells["tp_size"])),
        sm_clock_mhz=None,
        load=LoadShape(
            input_tokens=float(cells["isl"]),
            output_tokens=float(cells["osl"]),
            clients=clients,
            shortest_share=0.8 if is_inferencemax else 1.0,
            rounds=6 if runs_one_fewer else 10,
            warm_up_rounds=2 if runs_one_fewer else 0,
            max_running=max(1, clients - 1) if runs_one_fewer else clients,
        ),
        ttft_s=float(cells["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(cells["silicon_tpot_ms"]) / 1e3,
    )


def ml_energy_row(where: str, cells: Cells) -> ServedPower | None:
    """One served batch of ML.ENERGY; None for pipeline parallelism, whose activity is not known."""
    if cells["PP"] != "1":
        return None
    return ServedPower(
        where=where,
        gpu=_ML_ENERGY_GPUS.get(cells["GPU"], cells["GPU"]),
        model=_MODELS.get(cells["Model"], cells["Model"]),
        precision="bf16",
        tp=int(cells["TP"]),
        sequences=float(cells["Avg BS (reqs)"]),
        step_s=float(cells["Avg TPOT (s)"]),
        output_tokens=float(cells["Avg Output Tokens"]),
        power_w=float(cells["avg_W_per_gpu"]),
    )


@dataclass(frozen=True, slots=True)
class SplitwisePoint:
    """One of several repetitions of one static batch."""

    where: str
    key: tuple[str, str, int, int, int, int]  # model, GPU, TP, prompt, batch, output tokens
    prompt_s: float
    token_s: float
    average_power: float  # share of TDP, 0 = not measured
    peak_power: float


def splitwise_row(where: str, cells: Cells) -> SplitwisePoint:
    """One repetition."""
    sizes = (int(cells[name]) for name in ("tensor_parallel", "prompt_size", "batch_size", "token_size"))
    tp, prompt, batch, output = sizes
    model = _SPLITWISE_MODELS.get(cells["model"], cells["model"])
    return SplitwisePoint(
        where=where,
        key=(model, _HARDWARE.get(cells["hardware"], cells["hardware"]), tp, prompt, batch, output),
        prompt_s=float(cells["prompt_time"]) / 1e3,
        token_s=float(cells["token_time"]) / 1e3,
        average_power=float(cells["average_power"]),
        peak_power=float(cells["peak_power"]),
    )


def splitwise_medians(points: Iterable[SplitwisePoint]) -> tuple[Measurement, ...]:
    """One measurement for each static batch of 128 output tokens: the medians of its repetitions.

    Longer outputs stand in the data with end-to-end times that stop short of them, so only 128 tokens are used.
    """
    groups = defaultdict(list)
    for point in points:
        if point.key[-1] == 128:
            groups[point.key].append(point)
    return tuple(_static_batch(key, group) for key, group in groups.items())


def _static_batch(key: tuple[str, str, int, int, int, int], group: list[SplitwisePoint]) -> Measurement:
    model, gpu, tp, prompt, batch, output = key
    mean, peak = (statistics.median(getattr(p, name) for p in group) for name in ("average_power", "peak_power"))
    has_power = mean > 0.0 and peak < _HIGHEST_PEAK_TO_MEAN * mean
    return Measurement(
        where=group[0].where,
        gpu=gpu,
        model=model,
        precision="bf16",
        engine="vllm of 2023",
        tp=tp,
        sm_clock_mhz=None,
        load=LoadShape(float(prompt), float(output), batch, rounds=1, token_budget=_UNLIMITED_BUDGET),
        ttft_s=statistics.median(p.prompt_s for p in group),
        tpot_s=statistics.median(p.token_s for p in group),
        power_w=mean * _TDP_W[gpu] if has_power and gpu in _TDP_W else None,
    )

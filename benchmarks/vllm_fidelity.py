"""How well the engine model predicts real vLLM servers. Two experiments, each one command.

``python -m benchmarks.vllm_fidelity predict [--duration 240]`` starts a vLLM server on CPU with a model of its own,
sweeps it (`profile measure`), fits a profile, and then replays on it a Poisson load and a slice of the Azure
Conversation trace, both of which the engine model with that profile has predicted. Asked for: TTFT P50 and mean TBT
within 10 %, TTFT P99 within 20 %, throughput within 5 %. With ``--device`` the server has an emulated GPU, whose steps
are long beside what the host itself needs.

``python -m benchmarks.vllm_fidelity emulator`` runs one closed loop of 3, 24 and 96 streams, dealt out evenly, on three
emulated HTTP instances, and on three real vLLM servers with emulated devices. Asked for: TTFT P50 within 10 %, mean TBT
within 5 %.

Results are written to ``benchmarks/results/vllm_fidelity_*.json``. Both want a machine of their own, and a vLLM in
``DYNAMOLLM_VLLM`` (else ``.venv-vllm``); the slice is of the trace in ``$DYNAMOLLM_DATA`` (else ``../shared/data``).
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.adapters.clock import MonotonicClock
from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.adapters.profile_measure_run import SweepOrder, run_sweep
from benchmarks.adapters.target_facts import probe_prompts
from benchmarks.adapters.vllm_gateway import MODEL, PROFILE, START_S, emulated_devices, served, vllm_folder
from benchmarks.prediction import Latencies, differences, predict
from benchmarks.profile_measure import Kind, sweep
from benchmarks.replay import Outcome, Replay, ReplayRequest
from energy.adapters.catalogue import load_profile, save_fitted, write_whole
from energy.adapters.measurement_csv import read_measurements
from energy.fit import FitRequest, fit_profile
from energy.profile import EnergyProfile, StepCoefficients
from pools.drivers.vllm_clocks import GpuClocks
from simulator.engine import Engine, EngineLimits
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.arrivals import Arrivals
from simulator.workload.transform import scaled, window

RESULTS = Path(__file__).resolve().parent / "results"
MAKE_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "vllm-cpu" / "make_model.py"
BUSY = 0.5  # share of the time that steps take, by the prediction: what the replayed rates are chosen for
STEP_TOKENS = 8192  # of a step at most: what a fit takes engines to be started with
AZURE_SHARE = 0.25  # of the trace's token counts: its longest request then fits the model's context of 4096
# sweep of each server: lengths and clients
CPU_SWEEP = (((64, 32), (256, 48), (768, 64)), (1, 2, 4, 8))
DEVICE_SWEEP = (((128, 64), (1024, 64), (512, 128)), (1, 2, 4, 8, 16))
ON_CPU = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--distributed-executor-backend",
    "uni",
    "--no-enable-prefix-caching",
)


# --- a prediction against a real server ------------------------------------------------------------------------------


@contextmanager
def cpu_server(port: int) -> Iterator[str]:
    """A vLLM server on one CPU core whose steps take some 10 ms; its URL."""
    folder = vllm_folder()
    model = folder / "model-medium"
    if not (model / "model.safetensors").exists():
        subprocess.run([folder / "bin" / "python", MAKE_MODEL, "medium", model], check=True)
    limits = ("--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", "256")
    command = [folder / "bin" / "vllm", "serve", model, "--served-model-name", MODEL, "--port", str(port), *ON_CPU]
    more = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*map(str, command), "--kv-cache-memory-bytes", str(2**30), *limits],
            env={**os.environ, **more, "VLLM_NO_USAGE_STATS": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await_token(url, process, Path(log.name))
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def _await_token(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    body = {"model": MODEL, "prompt": "ready", "max_tokens": 2}
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise RuntimeError(f"the server at {url} gives no token: {log.read_text()[-2000:]}")


@contextmanager
def device_server() -> Iterator[str]:
    """A vLLM server with an emulated device of two H100s; its own URL, not the gateway's."""
    pools = [{"name": "LL", "request_class": "LL", "tp": 2}]
    configuration = emulated_devices(pools, 2)
    limits = ["--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", "256", "--no-enable-prefix-caching"]
    configuration["driver"]["vllm"]["arguments"] = limits
    with served(configuration) as gateway:
        yield gateway.status()["instances"][0]["url"]


def fitted(url: str, device: bool, folder: Path) -> EnergyProfile:
    """Sweep the server and fit a profile to it, both kept in the folder."""
    lengths, clients = DEVICE_SWEEP if device else CPU_SWEEP
    tp = 2 if device else 1
    rows = folder / "sweep.csv"
    order = SweepOrder(
        Target.of(url), MODEL, Kind("H100-SXM", "tiny", tp, "bf16"), sweep([1980], lengths, clients, []), rows
    )
    asyncio.run(run_sweep(order, GpuClocks({}), lambda load, _: print(f"measured {load}", file=sys.stderr, flush=True)))
    measurements = read_measurements(rows).measurements
    report = fit_profile(FitRequest("fidelity", measurements, needs_power=False, cross_validate=False))
    save_fitted(report.profile, folder / "profile.yaml")
    for name, errors in (("TTFT", report.times.ttft_errors), ("TBT", report.times.tpot_errors)):
        print(f"fit: median error of {name} in sample {np.nanmedian(np.abs(errors)):.1%}", file=sys.stderr)
    return report.profile


def new_engine(step: StepCoefficients, kv_tokens: int, step_tokens: int = STEP_TOKENS) -> Engine:
    """An engine with the server's limits."""
    return Engine(EngineLimits(kv_tokens // 16, max_num_seqs=256, max_num_batched_tokens=step_tokens), step)


def workloads(duration_s: float, step: StepCoefficients, kv_tokens: int) -> dict[str, Arrivals]:
    """A Poisson load and a slice of the Azure trace, each at the rate that keeps the predicted engine half busy.

    The slice has a quarter of the trace's token counts.
    """
    rng = np.random.default_rng(1)
    count = 20_000
    gaps_s = rng.exponential(1.0, count)
    inputs, outputs = rng.integers(32, 512, count), rng.integers(8, 96, count)
    azure = window(open_workload("azure-conv"), 600.0, duration_s)

    def poisson(rate_rps: float) -> Arrivals:
        times_s = np.cumsum(gaps_s) / rate_rps
        kept = times_s < duration_s
        return Arrivals.of(times_s[kept].tolist(), inputs[kept].tolist(), outputs[kept].tolist())

    def slice_of_azure(rate_rps: float) -> Arrivals:
        thinned = scaled(azure, rate_rps / azure.mean_rate_rps, 1).collect()
        lengths = [np.maximum(AZURE_SHARE * column, 2.0) for column in (thinned.input_tokens, thinned.output_tokens)]
        return Arrivals.of(thinned.arrival_s.tolist(), *(column.astype(int).tolist() for column in lengths))

    chosen = {}
    for name, made in (("poisson", poisson), ("azure-conv", slice_of_azure)):
        low, high = 0.1, 20.0
        for _ in range(8):
            middle = (low * high) ** 0.5
            arrivals = made(middle)
            busy = predict(new_engine(step, kv_tokens), arrivals).busy_share if len(arrivals) else 0.0
            low, high = (middle, high) if busy < BUSY else (low, middle)
        chosen[name] = made(low)
    return chosen


async def replayed(url: str, arrivals: Arrivals) -> Latencies:
    """The same requests on the real server, each sent when it is due."""
    clock, target = MonotonicClock(), Target.of(url)
    bodies = await probe_prompts(target, MODEL, False, clock)
    streams = HttpStreams(target, bodies.path, bodies.render, clock, 600.0)
    outcomes: list[Outcome] = []
    await Replay(arrivals, streams, clock, lambda _, outcome: outcomes.append(outcome)).run()
    streams.close()
    return latencies_of(outcomes)


def latencies_of(outcomes: list[Outcome]) -> Latencies:
    """Of all that finished. Raises ``RuntimeError`` if one did not."""
    if failures := [outcome.failure for outcome in outcomes if outcome.failure]:
        raise RuntimeError(f"{len(failures)} of {len(outcomes)} requests failed: {failures[0]}")
    return Latencies(
        np.array([np.nan if o.ttft_s is None else o.ttft_s for o in outcomes]),
        np.array([np.nan if o.mean_tbt_s is None else o.mean_tbt_s for o in outcomes]),
        sum(o.completion_tokens or 0 for o in outcomes),
        max(o.end_s for o in outcomes) - min(o.sent_s for o in outcomes),
    )


def run_predict(given: argparse.Namespace) -> dict[str, Any]:
    """Sweep, fit, predict, replay, compare."""
    name = "device" if given.device else "cpu"
    folder = given.out / f"vllm_fidelity_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not given.resume:
        (folder / "sweep.csv").unlink(missing_ok=True)
    results: dict[str, Any] = {}
    open_workload("azure-conv")  # a file that is missing is told before the sweep, not after it
    with device_server() if given.device else cpu_server(given.port) as url:
        profile = fitted(url, given.device, folder)
        tp = profile.tensor_parallel[0]
        kv_tokens = load_profile(PROFILE).kv_capacity_tokens(2) if given.device else 500_000
        step = profile.step(tp, 1980)
        for workload, arrivals in workloads(given.duration, step, kv_tokens).items():
            predicted = predict(new_engine(step, kv_tokens), arrivals)
            measured = asyncio.run(replayed(url, arrivals))
            results[workload] = {
                "requests": len(arrivals),
                "predicted": predicted.figures(),
                "measured": measured.figures(),
                "difference": differences(predicted.figures(), measured.figures()),
            }
            print(json.dumps({workload: results[workload]}), file=sys.stderr, flush=True)
    return results


# --- two kinds of emulation, one closed loop -------------------------------------------------------------------------


async def closed_loop(urls: Sequence[str], clients: int, rounds: int, lengths: tuple[int, int]) -> Latencies:
    """``clients`` that begin within two seconds, each one request after the other; the first of each is not counted.

    Each client stays with one of the servers.
    """
    clock = MonotonicClock()
    bodies = await probe_prompts(Target.of(urls[0]), MODEL, False, clock)
    servers = [HttpStreams(Target.of(url), bodies.path, bodies.render, clock, 600.0) for url in urls]
    outcomes: list[Outcome] = []
    began_s = clock.now_s()

    async def client(number: int) -> None:
        await clock.sleep_until(began_s + 2.0 * number / clients)
        for turn in range(rounds + 1):
            request = ReplayRequest(number * (rounds + 1) + turn, clock.now_s(), *lengths)
            outcome = await servers[number % len(servers)].complete(request)
            if turn or outcome.failure:
                outcomes.append(outcome)

    await asyncio.gather(*(client(number) for number in range(clients)))
    for streams in servers:
        streams.close()
    return latencies_of(outcomes)


def run_emulator(given: argparse.Namespace) -> dict[str, Any]:
    """The loop on both, and how far the emulated HTTP instance is from vLLM."""
    pools = [{"name": "LL", "request_class": "LL", "tp": 2, "instances": 3}]
    vllm = emulated_devices(pools, 6)
    vllm["driver"]["vllm"]["arguments"] = ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
    emulator = {**vllm, "driver": {"kind": "emulator"}}
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for kind, configuration in (("emulator", emulator), ("vllm", vllm)):
        with served(configuration) as gateway:
            urls = [instance["url"] for instance in gateway.status()["instances"]]
            for clients in given.clients:
                seen = asyncio.run(closed_loop(urls, clients, given.rounds, (200, 64)))
                figures.setdefault(kind, {})[clients] = seen.figures()
                print(kind, clients, json.dumps(seen.figures()), file=sys.stderr, flush=True)
    return {
        str(clients): {
            "emulator": figures["emulator"][clients],
            "vllm": figures["vllm"][clients],
            "difference": differences(figures["emulator"][clients], figures["vllm"][clients]),
        }
        for clients in given.clients
    }


def main() -> None:
    """Run one experiment, print and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    experiments = parser.add_subparsers(dest="experiment", required=True)
    predicting = experiments.add_parser("predict")
    predicting.add_argument("--device", action="store_true", help="an emulated GPU instead of the CPU itself")
    predicting.add_argument("--duration", type=float, default=240.0, help="seconds of each replay")
    predicting.add_argument("--port", type=int, default=18970)
    predicting.add_argument("--resume", action="store_true", help="go on with the sweep that is there")
    emulating = experiments.add_parser("emulator")
    emulating.add_argument("--clients", type=int, nargs="+", default=[3, 24, 96])
    emulating.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    name = f"predict_{'device' if given.device else 'cpu'}" if given.experiment == "predict" else "emulator"
    load_before = os.getloadavg()[0]
    results = run_predict(given) if given.experiment == "predict" else run_emulator(given)
    document = {
        "command": " ".join(["python -m benchmarks.vllm_fidelity", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPUs, load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
        "results": results,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_whole(given.out / f"vllm_fidelity_{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    print(json.dumps({key: value["difference"] for key, value in results.items()}, indent=1))


if __name__ == "__main__":
    main()
